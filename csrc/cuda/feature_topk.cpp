// The operator feature_topk on CUDA: a bound for each column, then the selection in the whole
// matrix. m is on the device: where capacity is too small for it, the `capacity` largest entries
// are kept.
#include "cuda/feature_topk.h"

#include "cuda/matrix_select.h"
#include "cuda/stream.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> feature_topk(const Tensor& x_in, const Tensor& m_in,
                                                int64_t capacity_in) {
  constexpr const char* op = "feature_topk";
  check_matrix(op, "x", x_in);
  const int64_t n = x_in.size(0), columns = x_in.size(1);
  check_rows(op, n);
  check_vector(op, "m", m_in, columns);
  check_int32(op, "m", m_in);
  check_device(op, "m", m_in, x_in);
  const int64_t capacity = selection_capacity(op, "capacity", capacity_in, n, columns);
  const Format format = format_of(op, "x", x_in);
  const DeviceScope device(x_in);
  const Tensor x = as_contiguous(x_in), m = as_contiguous(m_in);
  Tensor values = new_empty(x, {capacity}, x.scalar_type());
  Tensor indices = new_empty(x, {capacity}, ScalarType::Int);
  Tensor offsets = new_empty(x, {n + 1}, ScalarType::Int);
  Tensor lower_bound = new_empty(x, {columns}, accumulator_type(x));
  Tensor tie_row = new_empty(x, {columns}, ScalarType::Int);
  ColumnBoundParams bounds{.x = x.const_data_ptr(),
                           .n = n,
                           .columns = static_cast<int32_t>(columns),
                           .m = data_of<int32_t>(m),
                           .total = capacity,
                           .lower_bound = lower_bound.mutable_data_ptr(),
                           .tie_row = mutable_data_of<int32_t>(tie_row)};
  if (columns > 0) {
    Tensor lists = scratch(x, column_bound_scratch(bounds, format));
    bounds.scratch = lists.mutable_data_ptr();
    check_launch(op, launch_column_bound(bounds, format, device.stream()));
  }
  MatrixSelectParams params{.x = x.const_data_ptr(),
                            .n = n,
                            .m = static_cast<int32_t>(columns),
                            .capacity = capacity,
                            .threshold = lower_bound.const_data_ptr(),
                            .per_column = true,
                            .tie_row = data_of<int32_t>(tie_row),
                            .values = values.mutable_data_ptr(),
                            .indices = mutable_data_of<int32_t>(indices),
                            .offsets = mutable_data_of<int32_t>(offsets)};
  Tensor space = scratch(x, matrix_select_scratch(params, format));
  params.scratch = space.mutable_data_ptr();
  check_launch(op, launch_matrix_select(params, format, device.stream()));
  return {values, indices, offsets};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("feature_topk", TORCH_BOX(&feature_topk));
}

}  // namespace fastsae::cuda
