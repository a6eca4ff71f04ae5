// The active entries grouped by latent, as an operator.
#include "cpu/counting_sort.h"

namespace fastsae::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> group_by_latent(const Tensor& values, const Tensor& indices,
                                                   std::optional<Tensor> offsets, int64_t d_sae) {
  check_d_sae("group_by_latent", d_sae);
  const SparseActsArgs e = checked_sparse_acts("group_by_latent", values, indices, offsets, d_sae);
  const int64_t capacity = values.numel();
  Tensor bounds = new_empty(values, {d_sae + 1}, ScalarType::Int);
  Tensor rows = new_empty(values, {capacity}, ScalarType::Int);
  Tensor slots = new_empty(values, {capacity}, ScalarType::Int);
  dispatch_floating("group_by_latent", "values", values, [&](auto type) {
    using T = typename decltype(type)::type;
    counting_sort<T>(e, d_sae, mutable_data_of<int32_t>(bounds), mutable_data_of<int32_t>(rows),
                     mutable_data_of<int32_t>(slots));
  });
  return {bounds, rows, slots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("group_by_latent", TORCH_BOX(&group_by_latent));
}

}  // namespace fastsae::cpu
