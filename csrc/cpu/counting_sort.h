// The active entries grouped by latent, rows ascending: a counting sort, stable, so the order is
// the order of the input whatever the machine. O(entries + F).
#pragma once

#include <vector>

#include "cpu/sparse_acts_args.h"

namespace fastsae::cpu {

template <class T>
void counting_sort(const SparseActsArgs& e, int64_t d_sae, int32_t* offsets, int32_t* rows,
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

}  // namespace fastsae::cpu
