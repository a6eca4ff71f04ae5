// The k largest entries of each row of x [n, m], in one read of x.
//
// One block per row, which passes through registers a tile at a time. The maxima of disjoint groups
// of the first tile give a bound: the k-th largest of them, which k elements reach. Every tile is
// compared with it, each 16 bytes by the largest number in them; the few elements that reach it
// become candidates in shared memory. About k m / S (1 + k/2G) are expected for tiles of S elements
// and G groups. Of few candidates, the place of each is the number of larger ones; more are first
// thinned out by digits of their keys, and large k is sorted by a bitonic network. Where there are
// more candidates than there is room for (rows that ascend, or that are mostly one number), the row
// is selected from as a whole.
// Where there are few rows, or very long ones, a row is cut into parts, each a block's, and a
// second kernel selects among the candidates of all. k above 512, and float64, go through the
// selection from the row as a whole.
//
// Between two streams of a block lie the bound, two digits, and the selection: 11 barriers where k
// is small. Other blocks stream meanwhile, and the next row's first tile is fetched into the
// second-level cache.
//
// Cost: one read of x (topk_radix_kernel.cuh: up to 3 of 16-bit values, 5 of float32, 9 of
// float64); 8 bytes of shared memory per candidate; no atomics on global memory.
#pragma once

#include "cuda/held_tile.cuh"
#include "cuda/take_largest.cuh"
#include "cuda/topk_args.cuh"

namespace fastsae::cuda {

// A block takes one part of one row at a time: bound, filter, choose.
template <class F, bool kAffine, int kThreads, int kVectors, int kMaxima, int kResident>
__global__ void __launch_bounds__(kThreads, kResident) topk_kernel(TopkArgs<F> a) {
  using Bits = typename F::Bits;
  constexpr int E = F::kVector;
  constexpr float kMinusInf = -__builtin_huge_valf();
  FASTSAE_DYN_SMEM(uint64_t, candidates);  // [capacity], then [winner_capacity]
  __shared__ SelectSpace space;
  __shared__ unsigned warp_counts[2 * kThreads / 32];
  const int tid = static_cast<int>(threadIdx.x);
  const bool whole = a.parts == 1;
  clear_histogram(space);

  for (int64_t task = blockIdx.x; task < a.n * a.parts; task += gridDim.x) {
    const int64_t r = task / a.parts;
    const int part = static_cast<int>(task % a.parts);
    const Row<F, kAffine> row = a.template row<kAffine>(r);
    const int first = min(part * a.part_size, a.m), size = min(a.part_size, a.m - first);
    const int need = min(a.k, size);

    // Elements up to the first whole vector, the vectors, and the elements after them. Of those
    // outside of vectors there are fewer than threads.
    const int misaligned =
        static_cast<int>(reinterpret_cast<uintptr_t>(row.x + first) & 15) / int{sizeof(Bits)};
    const int head = min((E - misaligned) % E, size), vectors = (size - head) / E;
    const int body = first + head, tail = body + vectors * E;

    // The first tile has the elements outside of vectors too.
    const int step = kThreads * E, start = body + tid * E;
    if (tid == 0) space.candidate_count = space.winner_count = 0;
    HeldTile<F, kVectors> tile;

    const auto push = [&](unsigned at, Bits bits, int index) {
      if (at >= static_cast<unsigned>(a.capacity)) return;
      candidates[at] = candidate(float_key(F::widen(bits)), index);
    };
    float lower_bound = 0.0f;
#pragma unroll 1
    for (int begin = first; begin < first + size; begin += kVectors * step) {
      const int j = begin - first + start;
      row.load(tile.vectors, j, step, tail);
      if (begin == first) {
        const int single = tid < head ? first + tid : tail + tid - head;
        const bool has_single = tid < head || single < first + size;
        const float single_value = has_single ? F::widen(row.at(single)) : kMinusInf;
        lower_bound = tile.template bound<kMaxima>(single_value, start, step, tail, need, space);
        if (has_single && !(single_value < lower_bound)) {
          push(atomicAdd(&space.candidate_count, 1u), F::narrow(single_value), single);
        }
      }
      tile.filter(lower_bound, j, step, tail, space, push);
    }
    __syncthreads();  // all candidates are there
    int count = static_cast<int>(space.candidate_count);
    // Fetch the start of the next row while selecting from this one.
    if (whole && r + a.ahead < a.n) {
      constexpr int kTile = kVectors * kThreads * E;
      prefetch_block(row.x + a.ahead * a.m, min(a.m, kTile) * unsigned{sizeof(Bits)});
    }

    if (count > a.capacity) {
      count = need;
      radix_select<kThreads>(
          row, first, size, static_cast<unsigned>(need), space, warp_counts,
          [&](int place, int index) { push(static_cast<unsigned>(place), row.at(index), index); });
      __syncthreads();  // selected before they are ordered
    }
    const Order order = !whole ? Order::kAny : a.sorted ? Order::kByValue : Order::kByIndex;
    take_largest<kThreads, kMaxima == 1>(candidates, count, need, order, candidates + a.capacity,
                                         a.winner_capacity, space, [&](int place, uint64_t c) {
                                           if (whole) a.write(r * a.k + place, row, c);
                                           else a.partial[task * a.k + place] = c;
                                         });
    // A part shorter than k: 0 is below every candidate.
#pragma unroll 1
    for (int j = need + tid; j < a.k; j += kThreads) a.partial[task * a.k + j] = 0;
    __syncthreads();  // done with shared memory before the next row
  }
}

// The k largest among the candidates of all parts of a row.
template <class F, bool kAffine, int kThreads, bool kRanked>
__global__ void __launch_bounds__(kThreads) merge_parts_kernel(TopkArgs<F> a) {
  FASTSAE_DYN_SMEM(uint64_t, candidates);  // [parts k], then [winner_capacity]
  __shared__ SelectSpace space;
  const int count = a.parts * a.k;
  clear_histogram(space);
  for (int64_t r = blockIdx.x; r < a.n; r += gridDim.x) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      candidates[i] = a.partial[r * count + i];
    }
    if (threadIdx.x == 0) space.winner_count = 0;
    __syncthreads();  // loaded before they are compared
    const Row<F, kAffine> row = a.template row<kAffine>(r);
    take_largest<kThreads, kRanked>(
        candidates, count, a.k, a.sorted ? Order::kByValue : Order::kByIndex, candidates + count,
        a.winner_capacity, space, [&](int place, uint64_t c) { a.write(r * a.k + place, row, c); });
    __syncthreads();  // done with shared memory before the next row
  }
}

}  // namespace fastsae::cuda
