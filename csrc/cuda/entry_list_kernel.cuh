// Lists of entries by ascending (row, column): their offsets, and selections from several matrices
// merged a pair at a time.
#pragma once

#include "cuda/digit_search.cuh"

namespace fastsae::cuda {

// offsets[r], r <= n: how many of the ascending `rows` are below first_row + r.
__device__ __forceinline__ int32_t entries_before(const int32_t* rows, int64_t kept, int64_t row) {
  int64_t low = 0, high = kept;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (rows[middle] < row) low = middle + 1;
    else high = middle;
  }
  return static_cast<int32_t>(low);
}

// The columns and rows of a selection from a list; its values are merged already.
__global__ inline void __launch_bounds__(kSelectThreads)
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
