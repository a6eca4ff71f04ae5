// The k largest entries of each row of x [n, m], by radix selection on order-preserving keys.
//
// One block of kThreads per row. Every 8-bit digit of the key costs one read of the row (2 reads
// for 16-bit values, 4 for float32, 8 for float64) and a histogram in shared memory that names the
// digit of the k-th key; one more read writes what is above that key, and the first entries that
// equal it, in ascending index. So ties go to the lowest index and the order needs no sort.
// Keys: NaN largest, -0 equal to +0. Values are copied as bits, so every format is exact.
// Cost: (digits + 1) reads of the row; 1.1 KiB of shared memory; no atomics on global memory.
#pragma once

#include "cuda/block.cuh"
#include "cuda/number.cuh"
#include "cuda/topk.h"

namespace fastsae::cuda {

constexpr int kThreads = 256;
template <class F>
__global__ void __launch_bounds__(kThreads)
    topk_kernel(const typename F::Bits* __restrict__ x, int64_t n, int m, int k,
                typename F::Bits* __restrict__ values, int32_t* __restrict__ indices) {
  using Bits = typename F::Bits;
  constexpr int kWarps = kThreads / 32;
  __shared__ unsigned histogram[256];
  __shared__ unsigned chosen_digit, still_needed;
  __shared__ unsigned warp_above[kWarps], warp_equal[kWarps];
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5;

  for (int64_t row_index = blockIdx.x; row_index < n; row_index += gridDim.x) {
    const Bits* row = x + row_index * m;

    Bits prefix = 0, mask = 0;
    unsigned need = static_cast<unsigned>(k);
    for (int shift = F::kBits - 8; shift >= 0; shift -= 8) {
      histogram[tid] = 0;
      __syncthreads();  // zeroed before anyone counts
      for (int first = 0; first < m; first += kThreads) {
        const int j = first + tid;
        const Bits key = j < m ? F::key(row[j]) : Bits(0);
        const bool counted = j < m && static_cast<Bits>(key & mask) == prefix;
        const unsigned digit = counted ? static_cast<unsigned>(key >> shift) & 255u : 256u;
        // Lanes with the same digit add once: most keys share their upper digits.
        const unsigned peers = __match_any_sync(kFullWarp, digit);
        if (counted && lane == __ffs(static_cast<int>(peers)) - 1) {
          atomicAdd(&histogram[digit], static_cast<unsigned>(__popc(peers)));
        }
      }
      __syncthreads();  // counted before the digit is looked for
      if (warp == 0) find_digit(histogram, need, lane, &chosen_digit, &still_needed);
      __syncthreads();  // chosen before everyone reads it
      prefix = static_cast<Bits>(prefix | (static_cast<Bits>(chosen_digit) << shift));
      mask = static_cast<Bits>(mask | (Bits(255) << shift));
      need = still_needed;
      __syncthreads();  // read before the next round overwrites it
    }

    // Entry j goes to (entries above the k-th key before j) + min(equal ones before j, need).
    unsigned above_before = 0, equal_before = 0;
    const int64_t out = row_index * k;
    for (int first = 0; first < m; first += kThreads) {
      const int j = first + tid;
      const Bits bits = j < m ? row[j] : Bits(0);
      const Bits key = F::key(bits);
      const bool above = j < m && key > prefix, equal = j < m && key == prefix;
      const unsigned above_lanes = __ballot_sync(kFullWarp, above);
      const unsigned equal_lanes = __ballot_sync(kFullWarp, equal);
      if (lane == 0) {
        warp_above[warp] = static_cast<unsigned>(__popc(above_lanes));
        warp_equal[warp] = static_cast<unsigned>(__popc(equal_lanes));
      }
      __syncthreads();  // all warps have counted
      const unsigned lower = (1u << lane) - 1u;
      unsigned above_here = above_before + static_cast<unsigned>(__popc(above_lanes & lower));
      unsigned equal_here = equal_before + static_cast<unsigned>(__popc(equal_lanes & lower));
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) {
          above_here += warp_above[w];
          equal_here += warp_equal[w];
        }
        above_before += warp_above[w];
        equal_before += warp_equal[w];
      }
      if (above || (equal && equal_here < need)) {
        const int64_t to = out + above_here + (equal_here < need ? equal_here : need);
        values[to] = bits;
        indices[to] = j;
      }
      __syncthreads();  // counts read before the next tile overwrites them
    }
  }
}

// Reorders each row's k entries by descending key, lowest index first among equals: a bitonic sort
// of (key, ~index, position) in global scratch, one block per row.
template <class F>
__global__ void __launch_bounds__(kThreads)
    sort_kernel(int64_t n, int k, int size, uint64_t* __restrict__ space,
                typename F::Bits* __restrict__ values, int32_t* __restrict__ indices) {
  using Bits = typename F::Bits;
  for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
    uint64_t* keys = space + row * 2 * size;  // keys, then the bits and index they carry
    uint64_t* places = keys + size;
    Bits* value = values + row * k;
    int32_t* index = indices + row * k;
    for (int j = static_cast<int>(threadIdx.x); j < size; j += kThreads) {
      keys[j] = j < k ? static_cast<uint64_t>(F::key(value[j])) : 0;
      places[j] = static_cast<uint64_t>(j);
    }
    __syncthreads();  // filled before sorting
    for (int width = 2; width <= size; width <<= 1) {
      for (int step = width >> 1; step > 0; step >>= 1) {
        for (int j = static_cast<int>(threadIdx.x); j < size; j += kThreads) {
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
    for (int j = static_cast<int>(threadIdx.x); j < k; j += kThreads) {
      keys[j] = static_cast<uint64_t>(value[j]);
    }
    __syncthreads();  // old values saved before any is overwritten
    for (int j = static_cast<int>(threadIdx.x); j < k; j += kThreads) {
      const int from = static_cast<int>(places[j]);
      value[j] = static_cast<Bits>(keys[from]);
      places[j] = static_cast<uint64_t>(static_cast<uint32_t>(index[from]));
    }
    __syncthreads();  // old indices read before any is overwritten
    for (int j = static_cast<int>(threadIdx.x); j < k; j += kThreads) {
      index[j] = static_cast<int32_t>(places[j]);
    }
    __syncthreads();  // this row's scratch is idle before the next row
  }
}

}  // namespace fastsae::cuda
