// An epilogue of the product on Hopper that selects: sums that reach the bound of their row become
// candidates of it, and the others never go to memory.
#pragma once

#include "cuda/hopper_hits.cuh"
#include "cuda/row_candidates.cuh"

namespace fastsae::cuda {

// Sums of later columns than those that gave the bounds: one that equals its bound loses the tie.
// A row's count may exceed the capacity of its list, which then lacks candidates.
struct FilterSums {
  const float* bias;  // [columns], added to every row; or null
  const bool* mask;   // [columns]: others are no candidates; or null
  RowCandidates kept;
  int rows, columns;
  int first_column;  // of these columns, in the whole row
  bool absolute;     // by magnitude

  // What is compared.
  __device__ __forceinline__ float score(float value) const {
    return absolute ? fabsf(value) : value;
  }

  __device__ __forceinline__ void operator()(float (&s)[kSums], int row, int column) const {
    float bound[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bound[half] = row + 8 * half < rows ? just_above(kept.bound[row + 8 * half]) : 0.0f;
    }
    Hits hits;
    hits.mark(s, column, columns, bias, mask, [&](int half, int, float sum) {
      return !(score(sum) < bound[half]);  // "not below" lets NaN pass
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      if (r >= rows) hits.forget(half);
      unsigned at = reserve(r, hits.count(half));
      uint64_t* list = kept.entries + int64_t{r} * kept.capacity;
      hits.for_each(s, half, [&](float sum, int j, int e) {
        append(list, at++, sum, first_column + column + 8 * j + e);
      });
    }
  }

 private:
  __device__ __forceinline__ void append(uint64_t* list, unsigned at, float value, int c) const {
    if (at >= static_cast<unsigned>(kept.capacity)) return;
    const bool negative = (Float32::narrow(value) & Float32::kSign) != 0;
    list[at] = row_candidate(Float32::key(Float32::narrow(score(value))), c, negative);
  }

  // The first of `count` places in the list of row r, which 4 lanes share: they ask once.
  __device__ __forceinline__ unsigned reserve(int r, int count) const {
    const int lane = static_cast<int>(threadIdx.x) % 4;
    int upto = count;
#pragma unroll
    for (int step = 1; step < 4; step <<= 1) {
      const int other = __shfl_up_sync(kFullWarp, upto, step, 4);
      if (lane >= step) upto += other;
    }
    const int all = __shfl_sync(kFullWarp, upto, 3, 4);
    unsigned base = 0;
    if (lane == 0 && all > 0) base = atomicAdd(&kept.count[r], static_cast<unsigned>(all));
    return __shfl_sync(kFullWarp, base, 0, 4) + static_cast<unsigned>(upto - count);
  }
};

}  // namespace fastsae::cuda
