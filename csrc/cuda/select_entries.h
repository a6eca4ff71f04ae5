// What batch_topk and threshold_select share on CUDA: allocate and launch the selection in a matrix
// that is there.
#pragma once

#include "cuda/matrix_select.h"
#include "cuda/stream.h"
#include "selection.h"

namespace fastsae::cuda {

// The `capacity` largest entries of x [n, F] above the threshold; null for 0.
inline Selection select_entries(const char* op, const Tensor& x_in, int64_t capacity,
                                const Tensor* threshold) {
  const int64_t n = x_in.size(0);
  check_rows(op, n);
  const Format format = format_of(op, "x", x_in);
  const DeviceScope device(x_in);
  const Tensor x = as_contiguous(x_in);
  Selection out(x, n, capacity, x.scalar_type(), accumulator_type(x));
  MatrixSelectParams params{.x = x.const_data_ptr(),
                            .n = n,
                            .m = static_cast<int32_t>(x.size(1)),
                            .capacity = capacity,
                            .threshold = threshold ? threshold->const_data_ptr() : nullptr,
                            .per_column = threshold && threshold->dim() != 0,
                            .values = out.values.mutable_data_ptr(),
                            .indices = mutable_data_of<int32_t>(out.indices),
                            .offsets = mutable_data_of<int32_t>(out.offsets),
                            .smallest = out.threshold.mutable_data_ptr()};
  Tensor space = scratch(x, matrix_select_scratch(params, format));
  params.scratch = space.mutable_data_ptr();
  check_launch(op, launch_matrix_select(params, format, device.stream()));
  return out;
}

}  // namespace fastsae::cuda
