// What the threads of a block do together.
#pragma once

#include "cuda/platform.cuh"

namespace fastsae::cuda {

// Sums over lanes, in an order that depends on nothing: every lane gets the total.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T x, int lane) {
  for (int step = 1; step < 32; step <<= 1) {
    const T other = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// The sum of `x` over the threads before this one, and over all. Called by the whole block of
// kThreads; `space` [kThreads / 32] is free again after the next barrier.
template <int kThreads, class T>
__device__ __forceinline__ T block_exclusive_sum(T x, T* space, T* total) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  const T inclusive = warp_inclusive_sum(x, lane);
  if (lane == 31) space[warp] = inclusive;
  __syncthreads();  // every warp's sum is there
  T before = 0, all = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += space[w];
    all += space[w];
  }
  *total = all;
  return before + inclusive - x;
}

// The sum of `x` over the block, in a fixed order. Called by the whole block of kThreads; `space`
// [kThreads / 32] is free again after the next barrier.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T x, T* space) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  x = warp_sum(x);
  if (lane == 0) space[warp] = x;
  __syncthreads();  // every warp's sum is there
  T total = 0;
  for (int w = 0; w < kThreads / 32; ++w) total += space[w];
  return total;
}

// A digit that was searched for: which, how many keys have it, and how many of these are needed.
struct Digit {
  unsigned digit, size, rest;
};

// Finds, from a histogram of 256 digits (aligned to 16 bytes), the digit that holds the need-th
// largest key, and leaves the histogram zero. Lane l owns digits 255 - 8l .. 248 - 8l, so a scan
// over lanes counts from the largest digit down. Called by one whole warp.
__device__ __forceinline__ void find_digit(unsigned* histogram, unsigned need, int lane,
                                           Digit* found) {
  uint4* own = reinterpret_cast<uint4*>(histogram) + 2 * (31 - lane);
  const uint4 high = own[1], low = own[0];
  own[0] = own[1] = uint4{};
  const unsigned counts[8] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
  unsigned sum = 0;
#pragma unroll
  for (int b = 0; b < 8; ++b) sum += counts[b];
  const unsigned above = warp_inclusive_sum(sum, lane) - sum;
  if (above >= need || need > above + sum) return;  // one lane goes on
  Digit here{static_cast<unsigned>(255 - 8 * lane), counts[0], need - above};
  bool below = true;
#pragma unroll
  for (int b = 1; b < 8; ++b) {
    below = below && here.rest > here.size;
    if (below) here = {here.digit - 1, counts[b], here.rest - here.size};
  }
  *found = here;
}

// Adds one to histogram[digit] for the lanes where `counted`. Lanes with the same digit add once:
// most keys share their upper digits. Called by whole warps.
__device__ __forceinline__ void count_digit(unsigned* histogram, unsigned digit, bool counted,
                                            int lane) {
  const unsigned peers = __match_any_sync(kFullWarp, counted ? digit : 0xffffffffu);
  if (counted && lane == __ffs(static_cast<int>(peers)) - 1) {
    atomicAdd(&histogram[digit], static_cast<unsigned>(__popc(peers)));
  }
}

// Sorts `size` (a power of two) keys descending, in place: a bitonic network. Called by the whole
// block, after a barrier; ends with one.
__device__ inline void sort_descending(uint64_t* keys, int size) {
  for (int width = 2; width <= size; width <<= 1) {
    for (int step = width >> 1; step > 0; step >>= 1) {
      for (int i = static_cast<int>(threadIdx.x); i < size / 2; i += static_cast<int>(blockDim.x)) {
        const int j = 2 * i - (i & (step - 1));  // the lower one of pair i
        const uint64_t a = keys[j], b = keys[j + step];
        if ((a < b) == ((j & width) == 0)) {
          keys[j] = b;
          keys[j + step] = a;
        }
      }
      __syncthreads();  // one exchange step done by all before the next
    }
  }
}

}  // namespace fastsae::cuda
