// The active entries grouped by latent, rows ascending: a counting sort, stable, so the order is
// that of the input whatever the machine. O(entries + F).
#include "cpu/entries.h"

namespace fastsae::cpu {
namespace {

template <class T>
void counting_sort(const Entries& e, int64_t d_sae, int32_t* offsets, int32_t* rows,
                   int32_t* slots) {
  const T* value = data_of<T>(e.values);
  const int32_t* index = e.index;
  const auto active = [value](int64_t j) { return widen(value[j]) != 0; };
  std::fill(offsets, offsets + d_sae + 1, 0);
  for (int64_t j = 0; j < e.total; ++j) offsets[index[j] + 1] += active(j);
  for (int64_t f = 0; f < d_sae; ++f) offsets[f + 1] += offsets[f];
  std::vector<int32_t> cursor(offsets, offsets + d_sae);
  for (int64_t row = 0; row < e.n; ++row) {
    for (int64_t j = e.begin(row); j < e.end(row); ++j) {
      if (!active(j)) continue;
      const int32_t to = cursor[index[j]]++;
      rows[to] = static_cast<int32_t>(row);
      slots[to] = static_cast<int32_t>(j);
    }
  }
  std::fill(rows + offsets[d_sae], rows + e.values.numel(), 0);
  std::fill(slots + offsets[d_sae], slots + e.values.numel(), 0);
}

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
