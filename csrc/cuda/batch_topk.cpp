// Matrix-wide selections on CUDA: the `budget` largest positive entries, or the entries above
// theta. Check, allocate, launch on the current stream, register.
#include <algorithm>

#include "cuda/matrix_select.h"
#include "cuda/stream.h"

namespace fastsae::cuda {
namespace {

struct Selection {
  Tensor values, indices, offsets, threshold;
};

// theta: null for 0.
Selection select(const char* op, const Tensor& x_in, int64_t cap_in, const Tensor* theta) {
  const int64_t n = x_in.size(0);
  const int64_t cap = std::min(cap_in, x_in.numel());
  check_rows(op, n);
  check_entries(op, cap);
  const Format format = format_of(op, "x", x_in);
  const DeviceScope device(x_in);
  const Tensor x = as_contiguous(x_in);
  Selection out{new_empty(x, {cap}, x.scalar_type()), new_empty(x, {cap}, ScalarType::Int),
                new_empty(x, {n + 1}, ScalarType::Int), new_empty(x, {}, accumulator_type(x))};
  MatrixSelectParams params{.x = x.const_data_ptr(),
                            .n = n,
                            .m = static_cast<int32_t>(x.size(1)),
                            .cap = cap,
                            .theta = theta ? theta->const_data_ptr() : nullptr,
                            .per_column = theta && theta->dim() != 0,
                            .values = out.values.mutable_data_ptr(),
                            .indices = mutable_data_of<int32_t>(out.indices),
                            .offsets = mutable_data_of<int32_t>(out.offsets),
                            .threshold = out.threshold.mutable_data_ptr()};
  Tensor space = scratch(x, matrix_select_scratch(params, format));
  params.scratch = space.mutable_data_ptr();
  check_launch(op, launch_matrix_select(params, format, device.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_topk(const Tensor& x, int64_t budget,
                                                      std::optional<Tensor> hint) {
  constexpr const char* op = "batch_topk";
  check_matrix(op, "x", x);
  check_hint(op, hint);  // and no more: a sample serves better here
  if (hint) check_device(op, "threshold_guess", *hint, x);
  FASTSAE_CHECK(budget >= 0, op, ": expected budget >= 0, got ", budget);
  const Selection s = select(op, x, budget, nullptr);
  return {s.values, s.indices, s.offsets, s.threshold};
}

std::tuple<Tensor, Tensor, Tensor> threshold_select(const Tensor& x, const Tensor& theta_in,
                                                    int64_t cap) {
  constexpr const char* op = "threshold_select";
  check_matrix(op, "x", x);
  const Tensor theta = as_contiguous(theta_in);
  check_theta(op, theta, x, x.size(1));
  FASTSAE_CHECK(cap >= 0, op, ": expected capacity >= 0, got ", cap);
  check_device(op, "threshold", theta, x);
  const Selection s = select(op, x, cap, &theta);
  return {s.values, s.indices, s.offsets};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_topk", TORCH_BOX(&batch_topk));
  m.impl("threshold_select", TORCH_BOX(&threshold_select));
}

}  // namespace fastsae::cuda
