// Sparse activations as the CPU ops read them: checked once, then plain pointers.
#pragma once

#include <algorithm>
#include <optional>

#include "check.h"
#include "dispatch.h"
#include "torch.h"

namespace fastsae::cpu {

struct SparseActsArgs {
  Tensor values;   // contiguous
  Tensor indices;  // contiguous int32
  Tensor offsets;  // [n + 1] int32, only for the variable layout
  bool fixed;
  int64_t n, k, total;  // total: entries that are not padding
  const int32_t* index = nullptr;
  const int32_t* bound = nullptr;  // offsets

  int64_t begin(int64_t row) const { return fixed ? row * k : bound[row]; }
  int64_t end(int64_t row) const { return fixed ? (row + 1) * k : bound[row + 1]; }
};

// Checks shapes, offsets and that every index is in [0, d_sae): nothing is read out of bounds.
inline SparseActsArgs checked_sparse_acts(const char* op, const Tensor& values,
                                          const Tensor& indices,
                                          const std::optional<Tensor>& offsets, int64_t d_sae) {
  SparseActsArgs e{
      as_contiguous(values), as_contiguous(indices), indices, !offsets.has_value(), 0, 0, 0};
  check_entries_layout(op, values, indices, offsets);
  if (e.fixed) {
    e.n = values.size(0);
    e.k = values.size(1);
    e.total = values.numel();
  } else {
    e.offsets = as_contiguous(*offsets);
    e.n = offsets->size(0) - 1;
    e.bound = data_of<int32_t>(e.offsets);
    bool ordered = e.bound[0] == 0;
    for (int64_t row = 0; row < e.n; ++row) ordered &= e.bound[row] <= e.bound[row + 1];
    FASTSAE_CHECK(ordered && e.bound[e.n] <= values.numel(), op,
                  ": expected offsets to ascend from 0 to at most ", values.numel());
    e.total = e.bound[e.n];
  }
  e.index = data_of<int32_t>(e.indices);
  // The sign bit of `outside` is set by an index below 0 or above the last one.
  const uint32_t last = static_cast<uint32_t>(d_sae) - 1;
  uint32_t outside = 0;
  for (int64_t j = 0; j < e.total; ++j) {
    const uint32_t index = static_cast<uint32_t>(e.index[j]);
    outside |= index | (last - index);
  }
  if (outside >> 31) {
    const auto wrong = [d_sae](int32_t index) { return index < 0 || index >= d_sae; };
    const int32_t* found = std::find_if(e.index, e.index + e.total, wrong);
    FASTSAE_CHECK(false, op, ": expected 0 <= indices < d_sae = ", d_sae, ", got ", *found);
  }
  return e;
}

}  // namespace fastsae::cpu
