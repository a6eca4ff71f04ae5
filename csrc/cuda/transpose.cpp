// The operator transpose on CUDA: check, allocate, launch on the current stream, register.
#include "cuda/transpose.h"

#include "cuda/sparse_args.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> transpose(const Tensor& values, const Tensor& indices,
                                             std::optional<Tensor> offsets, int64_t d_sae) {
  constexpr const char* op = "transpose";
  FASTSAE_CHECK(d_sae >= 0, "transpose: expected d_sae >= 0, got ", d_sae);
  FASTSAE_CHECK(d_sae < INT32_MAX, "transpose: expected d_sae < 2^31 - 1, got ", d_sae);
  const Format format = format_of(op, "values", values);
  const DeviceScope device(values);
  const Entries e =
      checked_entries(op, values, indices, offsets, d_sae, values.scalar_type(), "values", values);
  Tensor bounds = new_empty(values, {d_sae + 1}, ScalarType::Int);
  Tensor rows = new_empty(values, {e.params.cap}, ScalarType::Int);
  Tensor slots = new_empty(values, {e.params.cap}, ScalarType::Int);
  Tensor space = scratch(values, transpose_scratch(e.params));
  const TransposeParams params{e.params, mutable_data_of<int32_t>(bounds),
                               mutable_data_of<int32_t>(rows), mutable_data_of<int32_t>(slots),
                               space.mutable_data_ptr()};
  check_launch(op, launch_transpose(params, format, device.stream()));
  return {bounds, rows, slots};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("transpose", TORCH_BOX(&transpose));
}

}  // namespace fastsae::cuda
