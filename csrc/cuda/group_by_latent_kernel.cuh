// The active entries grouped by latent, rows ascending: a stable radix sort of (latent, slot) by
// latent, lowest digit first. Inactive entries count as latent d_sae and end up after all others.
//
// A pass sorts by one digit of up to kMostBits bits. Every block owns one range of the entries:
//   1. count:   how often each digit occurs in the range            -> table [bins, blocks]
//   2. scan:    per digit, the sum over the blocks before           -> table, totals [bins]
//   3. scatter: the place of every entry: entries of smaller digits, of the same digit in blocks
//      before, in tiles before, in warps before, and in lanes before.
// Then the lists' bounds are found by binary search in the sorted latents.
//
// The order is the order of the input, whatever the grid: atomics only count, in shared memory.
// Cost: about 16 bytes per entry and pass, from L2 for all but huge inputs.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/group_by_latent.h"

namespace fastsae::cuda {

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / 32;
constexpr int kSortItems = 8;  // of a thread, one tile
constexpr int kTile = kSortThreads * kSortItems;
constexpr int kMostBits = 10, kMostBins = 1 << kMostBits;

// One pass, and the entries that a block owns.
struct SortPass {
  int capacity, per_block;  // per_block: a multiple of kTile
  int shift, bins;
  __device__ __forceinline__ unsigned digit(uint32_t key) const {
    return key >> shift & static_cast<unsigned>(bins - 1);
  }
  __device__ __forceinline__ int first() const { return static_cast<int>(blockIdx.x) * per_block; }
  // Tiles of this block that hold entries.
  __device__ __forceinline__ int tiles() const {
    return (min(per_block, capacity - first()) + kTile - 1) / kTile;
  }
};

template <class Key>
__device__ __forceinline__ void count_range(const SortPass& pass, unsigned* table, Key&& key) {
  __shared__ unsigned histogram[kMostBins];
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31;
  for (int b = tid; b < pass.bins; b += kSortThreads) histogram[b] = 0;
  __syncthreads();  // zeroed before anyone counts
  for (int i = 0; i < pass.tiles() * kSortItems; ++i) {
    const int64_t j = pass.first() + int64_t{i} * kSortThreads + tid;
    const bool inside = j < pass.capacity;
    count_digit(histogram, inside ? pass.digit(key(static_cast<int>(j))) : 0, inside, lane);
  }
  __syncthreads();  // counted before it is written
  for (int b = tid; b < pass.bins; b += kSortThreads) {
    table[int64_t{b} * gridDim.x + blockIdx.x] = histogram[b];
  }
}

// count_kernel of the first pass, which also makes the keys.
template <class F>
__global__ void __launch_bounds__(kSortThreads)
    first_count_kernel(SparseActsView<F> entries, SortPass pass, uint32_t* keys, unsigned* table) {
  const int total = entries.p.offsets ? entries.end(entries.p.n - 1) : entries.p.capacity;
  count_range(pass, table, [&](int j) {
    uint32_t key = static_cast<uint32_t>(entries.p.d_sae);
    if (j < total) {
      const Entry<typename F::Acc> entry = entries.entry(j);
      if (entry.weight != 0) key = static_cast<uint32_t>(entry.index);
    }
    return keys[j] = key;
  });
}

// Counts the digits of the keys of a block's range.
__global__ void __launch_bounds__(kSortThreads)
    count_kernel(SortPass pass, const uint32_t* __restrict__ keys, unsigned* __restrict__ table) {
  count_range(pass, table, [&](int j) { return keys[j]; });
}

// Sums every digit's counts over the blocks before; a warp per digit.
__global__ void __launch_bounds__(kSortThreads)
    scan_kernel(int bins, int blocks, unsigned* __restrict__ table, unsigned* __restrict__ totals) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  int b = static_cast<int>(blockIdx.x) * kSortWarps + static_cast<int>(threadIdx.x) / 32;
  for (; b < bins; b += static_cast<int>(gridDim.x) * kSortWarps) {
    unsigned* row = table + int64_t{b} * blocks;
    unsigned before = 0;
    for (int first = 0; first < blocks; first += 32) {
      const bool inside = first + lane < blocks;
      const unsigned count = inside ? row[first + lane] : 0;
      const unsigned inclusive = warp_inclusive_sum(count, lane);
      if (inside) row[first + lane] = before + inclusive - count;
      before += __shfl_sync(kFullWarp, inclusive, 31);
    }
    if (lane == 0) totals[b] = before;
  }
}

// Moves keys and slots to their places. slots: null in the first pass, where entry j is slot j.
__global__ void __launch_bounds__(kSortThreads)
    scatter_kernel(SortPass pass, const uint32_t* __restrict__ keys,
                   const int32_t* __restrict__ slots, const unsigned* __restrict__ table,
                   const unsigned* __restrict__ totals, uint32_t* __restrict__ keys_out,
                   int32_t* __restrict__ slots_out) {
  __shared__ unsigned place[kMostBins];               // of the next entry with this digit
  __shared__ unsigned counts[kSortWarps][kMostBins];  // per warp: how many, then the place
  __shared__ unsigned space[kSortWarps];
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5;
  const unsigned lower = (1u << lane) - 1u;

  constexpr int kOwn = kMostBins / kSortThreads;
  unsigned own[kOwn], sum = 0, all;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int b = tid * kOwn + i;
    own[i] = b < pass.bins ? totals[b] : 0;
    sum += own[i];
  }
  unsigned before = block_exclusive_sum<kSortThreads>(sum, space, &all);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int b = tid * kOwn + i;
    if (b < pass.bins) place[b] = before + table[int64_t{b} * gridDim.x + blockIdx.x];
    before += own[i];
  }

  for (int tile = 0; tile < pass.tiles(); ++tile) {
    for (int b = lane; b < pass.bins; b += 32) counts[warp][b] = 0;
    __syncwarp();
    // A warp owns 32 kSortItems entries in a row.
    const int64_t first = pass.first() + int64_t{tile} * kTile + warp * 32 * kSortItems + lane;
    uint32_t key[kSortItems];
    unsigned rank[kSortItems];
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) {
      key[i] = first + 32 * i < pass.capacity ? keys[first + 32 * i] : 0;
    }
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) {
      const bool inside = first + 32 * i < pass.capacity;
      const unsigned digit = pass.digit(key[i]);
      const unsigned peers = __match_any_sync(kFullWarp, inside ? digit : ~0u);
      const unsigned seen = counts[warp][digit];
      rank[i] = seen + static_cast<unsigned>(__popc(peers & lower));
      __syncwarp();  // read by all peers before one of them writes
      if (inside && (peers & lower) == 0) {
        counts[warp][digit] = seen + static_cast<unsigned>(__popc(peers));
      }
      __syncwarp();
    }
    __syncthreads();  // all warps have counted, and `place` is complete
    for (int b = tid; b < pass.bins; b += kSortThreads) {
      unsigned next = place[b];
      for (int w = 0; w < kSortWarps; ++w) {
        const unsigned count = counts[w][b];
        counts[w][b] = next;
        next += count;
      }
      place[b] = next;
    }
    __syncthreads();  // all places are known
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) {
      const int64_t j = first + 32 * i;
      if (j >= pass.capacity) continue;
      const unsigned to = counts[warp][pass.digit(key[i])] + rank[i];
      keys_out[to] = key[i];
      slots_out[to] = slots ? slots[j] : static_cast<int32_t>(j);
    }
    __syncwarp();  // the warp's places are read before it counts again
  }
}

// From sorted keys and slots to the lists; slots may be those of the output.
template <class F>
__global__ void __launch_bounds__(kSortThreads)
    lists_kernel(SparseActsView<F> entries, const uint32_t* __restrict__ keys,
                 const int32_t* __restrict__ slots, int32_t* __restrict__ offsets,
                 int32_t* __restrict__ rows, int32_t* __restrict__ slots_out) {
  const SparseActsParams& p = entries.p;
  const int64_t longest = max(static_cast<int64_t>(p.capacity), static_cast<int64_t>(p.d_sae) + 1);
  int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  for (; i < longest; i += static_cast<int64_t>(gridDim.x) * kSortThreads) {
    if (i <= p.d_sae) {
      int low = 0, high = p.capacity;  // the first key that is not below i
      while (low < high) {
        const int middle = low + (high - low) / 2;
        if (keys[middle] < static_cast<uint32_t>(i)) low = middle + 1;
        else high = middle;
      }
      offsets[i] = low;
    }
    if (i < p.capacity) {
      const bool active = keys[i] < static_cast<uint32_t>(p.d_sae);
      const int slot = active ? slots[i] : 0;
      int64_t row = 0;
      if (active && !p.offsets) {
        row = slot / p.k;
      } else if (active) {
        int64_t high = p.n;  // the first row that ends after the slot
        while (row < high) {
          const int64_t middle = (row + high) / 2;
          if (entries.end(middle) <= slot) row = middle + 1;
          else high = middle;
        }
      }
      rows[i] = static_cast<int32_t>(row);
      slots_out[i] = slot;
    }
  }
}

}  // namespace fastsae::cuda
