// topk of any k and any format, by radix selection from each row as a whole; sorted afterwards.
#pragma once

#include "cuda/topk_args.cuh"

namespace fastsae::cuda {

constexpr int kRadixThreads = 512;

// Any k and any format: from each row as a whole, in ascending index.
template <class F, bool kAffine>
__global__ void __launch_bounds__(kRadixThreads) radix_topk_kernel(TopkArgs<F> a) {
  __shared__ SelectSpace space;
  __shared__ unsigned warp_counts[2 * kRadixThreads / 32];
  clear_histogram(space);
  for (int64_t r = blockIdx.x; r < a.n; r += gridDim.x) {
    const Row<F, kAffine> row = a.template row<kAffine>(r);
    radix_select<kRadixThreads>(
        row, 0, a.m, static_cast<unsigned>(a.k), space, warp_counts,
        [&](int place, int index) { a.write(r * a.k + place, row, index, row.at(index)); });
  }
}

// Reorders each row's k entries, which are in ascending index, by descending value, lowest index
// first among equals: a bitonic sort of keys and places in global scratch, one block per row.
template <class F>
__global__ void __launch_bounds__(kRadixThreads, 2)
    sort_kernel(int64_t n, int k, int size, uint64_t* __restrict__ space,
                typename F::Bits* __restrict__ values, int32_t* __restrict__ indices) {
  using Bits = typename F::Bits;
  for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
    uint64_t* keys = space + static_cast<int64_t>(blockIdx.x) * 2 * size;
    uint64_t* places = keys + size;
    Bits* value = values + row * k;
    int32_t* index = indices + row * k;
    for (int j = static_cast<int>(threadIdx.x); j < size; j += kRadixThreads) {
      keys[j] = j < k ? static_cast<uint64_t>(F::key(value[j])) : 0;
      places[j] = static_cast<uint64_t>(j);
    }
    __syncthreads();  // filled before sorting
    for (int width = 2; width <= size; width <<= 1) {
      for (int step = width >> 1; step > 0; step >>= 1) {
#pragma unroll 1
        for (int j = static_cast<int>(threadIdx.x); j < size; j += kRadixThreads) {
          const int p = j ^ step;
          if (p < j) continue;
          // Places ascend with the index, so they break ties; padding (key 0) has the highest.
          const bool j_first = keys[j] > keys[p] || (keys[j] == keys[p] && places[j] < places[p]);
          const bool want_j_first = (j & width) == 0;
          if (j_first == want_j_first) continue;
          const uint64_t key = keys[j], place = places[j];
          keys[j] = keys[p];
          places[j] = places[p];
          keys[p] = key;
          places[p] = place;
        }
        __syncthreads();  // one exchange step done by all before the next
      }
    }
    // Gather through the scratch: the keys are no longer needed and take the old entries.
    for (int j = static_cast<int>(threadIdx.x); j < k; j += kRadixThreads) {
      keys[j] = static_cast<uint64_t>(value[j]);
    }
    __syncthreads();  // old values saved before any is overwritten
    for (int j = static_cast<int>(threadIdx.x); j < k; j += kRadixThreads) {
      const int from = static_cast<int>(places[j]);
      value[j] = static_cast<Bits>(keys[from]);
      places[j] = static_cast<uint64_t>(static_cast<uint32_t>(index[from]));
    }
    __syncthreads();  // old indices read before any is overwritten
    for (int j = static_cast<int>(threadIdx.x); j < k; j += kRadixThreads) {
      index[j] = static_cast<int32_t>(places[j]);
    }
    __syncthreads();  // done with the scratch before the next row
  }
}

}  // namespace fastsae::cuda
