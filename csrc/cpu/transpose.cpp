// The active entries grouped by latent, as an operator.
#include "cpu/counting_sort.h"

namespace fastsae::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> transpose(const Tensor& values, const Tensor& indices,
                                             std::optional<Tensor> offsets, int64_t d_sae) {
  FASTSAE_CHECK(d_sae >= 0, "transpose: expected d_sae >= 0, got ", d_sae);
  const Entries e = checked_entries("transpose", values, indices, offsets, d_sae);
  const int64_t cap = values.numel();
  Tensor bounds = new_empty(values, {d_sae + 1}, ScalarType::Int);
  Tensor rows = new_empty(values, {cap}, ScalarType::Int);
  Tensor slots = new_empty(values, {cap}, ScalarType::Int);
  dispatch_floating("transpose", "values", values, [&](auto type) {
    using T = typename decltype(type)::type;
    counting_sort<T>(e, d_sae, mutable_data_of<int32_t>(bounds), mutable_data_of<int32_t>(rows),
                     mutable_data_of<int32_t>(slots));
  });
  return {bounds, rows, slots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("transpose", TORCH_BOX(&transpose));
}

}  // namespace fastsae::cpu
