// What a block of columns adds to the candidates of its rows, and the choice at the end.
//
// One CUDA block per row, as in topk_kernel.cuh: of the first block of columns, the maxima of
// disjoint groups give a bound; every block's elements are compared with the row's bound, and the
// few that reach it are appended to its list. A list that is full is tightened to its k largest,
// the smallest of which is a better bound. Elements of later blocks have to exceed the bound: with
// it they would lose the tie. Where a block has more candidates than there is room for (rows that
// ascend), its k largest are selected by radix digits and take their place. So what is kept always
// holds the k largest of all that was met.
//
// Cost: one read of the block, from the second-level cache if it is still there; 8 bytes written
// per candidate, of which there are about k (1 + log(columns / block)) in random order, and as many
// read at every tightening. No atomics on global memory.
#pragma once

#include "cuda/held_tile.cuh"
#include "cuda/row_candidates.cuh"

namespace fastsae::cuda {

constexpr int kRowListThreads = 256;
constexpr int kRowListVectors = 4;

// The part of a row that a block has, as it is compared.
struct BlockRow {
  using Format = Float32;
  Row<Float32, true> row;  // without the mask
  const bool* mask;
  bool absolute;

  // The bits of what is compared, from those of the value.
  __device__ __forceinline__ uint32_t score(uint32_t bits, int j) const {
    if (absolute) bits &= ~Float32::kSign;
    return mask && !mask[j] ? Float32::kSign | Float32::kInf : bits;
  }
  __device__ __forceinline__ uint32_t at(int j) const { return score(row.at(j), j); }
  __device__ __forceinline__ bool is_negative(int j) const {
    return (row.at(j) & Float32::kSign) != 0;
  }

  template <int kVectors>
  __device__ __forceinline__ void load(uint4 (&v)[kVectors], int j, int step, int end) const {
    row.load(v, j, step, end);
    if (!mask && !absolute) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = j + i * step;
      if (at >= end) continue;
      v[i] = {score(v[i].x, at), score(v[i].y, at + 1), score(v[i].z, at + 2),
              score(v[i].w, at + 3)};
    }
  }
};

// Of shared memory: candidates of a block, a whole list, and the winners among both.
struct RowListShape {
  int room, winner_capacity;
};

template <int kMaxima>
__global__ void __launch_bounds__(kRowListThreads, kMaxima == 1 ? 4 : 3)
    filter_rows_kernel(FilterRowsParams p, RowListShape shape) {
  constexpr int kThreads = kRowListThreads, kVectors = kRowListVectors;
  constexpr int E = Float32::kVector, kStep = kThreads * E;
  constexpr bool kRanked = kMaxima == 1;
  constexpr float kMinusInf = -__builtin_huge_valf();
  FASTSAE_DYN_SMEM(uint64_t, fresh);  // [room + capacity], then [winner_capacity]
  __shared__ ListSpace space;
  __shared__ unsigned warp_counts[2 * kThreads / 32];
  const int tid = static_cast<int>(threadIdx.x);
  const bool first = p.first_column == 0;
  SelectSpace& select = space.select;
  clear_histogram(select);

  for (int64_t r = blockIdx.x; r < p.n; r += gridDim.x) {
    const BlockRow row{{reinterpret_cast<const uint32_t*>(p.x) + r * p.pitch, p.bias, nullptr},
                       p.mask,
                       p.absolute};
    const int held = first ? 0 : static_cast<int>(p.kept.count[r]);
    const float met = first ? kMinusInf : p.kept.bound[r];
    float bound = held >= p.k ? just_above(met) : met;
    if (tid == 0) select.candidate_count = 0;
    __syncthreads();  // zero, and the list's count read, before anyone adds to it
    const auto push = [&](unsigned at, uint32_t bits, int j) {
      if (at >= static_cast<unsigned>(shape.room)) return;
      fresh[at] = row_candidate(Float32::key(bits), p.first_column + j, row.is_negative(j));
    };
    // Up to 3 elements are outside of vectors; the first tile has them too.
    const int tail = p.width / E * E;
    HeldTile<Float32, kVectors> tile;
#pragma unroll 1
    for (int begin = 0; begin == 0 || begin < tail; begin += kVectors * kStep) {
      const int j = begin + tid * E;
      row.load(tile.vectors, j, kStep, tail);
      if (begin == 0) {
        const bool has_single = tail + tid < p.width;
        const uint32_t single = has_single ? row.at(tail + tid) : Float32::kSign | Float32::kInf;
        if (first) {
          bound = tile.template bound<kMaxima>(Float32::widen(single), j, kStep, tail,
                                               min(p.k, p.width), select);
        }
        if (has_single && !(Float32::widen(single) < bound)) {
          push(atomicAdd(&select.candidate_count, 1u), single, tail + tid);
        }
      }
      tile.filter(bound, j, kStep, tail, select, push);
    }
    __syncthreads();  // all candidates of the block are there
    int count = static_cast<int>(select.candidate_count);
    if (count > shape.room) {
      count = min(p.k, p.width);
      radix_select<kThreads>(
          row, 0, p.width, static_cast<unsigned>(count), select, warp_counts,
          [&](int place, int j) { push(static_cast<unsigned>(place), row.at(j), j); });
      __syncthreads();  // selected before they are used
    }
    uint64_t* list = p.kept.entries + r * p.kept.capacity;
    if (held + count <= p.kept.capacity) {
      for (int i = tid; i < count; i += kThreads) list[held + i] = fresh[i];
      if (tid == 0) {
        p.kept.count[r] = static_cast<uint32_t>(held + count);
        if (first) p.kept.bound[r] = bound;
      }
    } else {
      for (int i = tid; i < held; i += kThreads) fresh[count + i] = list[i];
      tighten_row<kThreads, kRanked>(p.kept, r, fresh, held + count, p.k,
                                     fresh + shape.room + p.kept.capacity, shape.winner_capacity,
                                     space);
    }
    __syncthreads();  // done with shared memory before the next row
  }
}

template <bool kRanked>
__global__ void __launch_bounds__(kRowListThreads)
    choose_rows_kernel(ChooseRowsParams p, RowListShape shape) {
  FASTSAE_DYN_SMEM(uint64_t, entries);  // [capacity], then [winner_capacity]
  __shared__ ListSpace space;
  clear_histogram(space.select);
  for (int64_t r = blockIdx.x; r < p.n; r += gridDim.x) {
    const int count = static_cast<int>(p.kept.count[r]);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kRowListThreads) {
      entries[i] = p.kept.entries[r * p.kept.capacity + i];
    }
    choose_row<kRowListThreads, kRanked>(p, r, entries, count, entries + p.kept.capacity,
                                         shape.winner_capacity, space);
    __syncthreads();  // done with shared memory before the next row
  }
}

}  // namespace fastsae::cuda
