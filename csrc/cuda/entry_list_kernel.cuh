// Lists of entries by ascending (row, column): their offsets, and selections from several matrices
// merged a pair at a time. Not all templates: for one launcher only.
#pragma once

#include "cuda/matrix_select_choose_kernel.cuh"

namespace fastsae::cuda {

// The columns and rows of a selection from a list; its values are merged already.
__global__ void __launch_bounds__(kSelectThreads)
    gather_entries_kernel(const int32_t* columns, const int32_t* rows, const int32_t* chosen,
                          const int32_t* half, int64_t capacity, int32_t* merged_columns,
                          int32_t* merged_rows) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; j < capacity;
       j += threads) {
    const bool padding = half[j] == 0x7fffffff;
    const int64_t from = padding ? 0 : half[j] * capacity + chosen[j];
    merged_columns[j] = padding ? 0 : columns[from];
    merged_rows[j] = padding ? 0x7fffffff : rows[from];
  }
}

// From a list to the variable layout: its offsets, and zeros for padding.
template <class F>
__global__ void __launch_bounds__(kSelectThreads)
    finish_list_kernel(typename F::Bits* values, const int32_t* rows, int64_t capacity, int64_t n,
                       int32_t* offsets) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t r = thread; r <= n; r += threads) offsets[r] = entries_before(rows, capacity, r);
  for (int64_t j = thread; j < capacity; j += threads) {
    if (rows[j] == 0x7fffffff) values[j] = 0;
  }
}

}  // namespace fastsae::cuda
