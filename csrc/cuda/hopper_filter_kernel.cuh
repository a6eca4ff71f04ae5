// An epilogue of the product on Hopper that selects: sums that reach the bound of their row become
// candidates of it, and the others never go to memory.
#pragma once

#include "cuda/hopper_product_kernel.cuh"
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
    constexpr int kEights = kProductColumns / 8;  // 2 columns of each, in 2 rows
    float bound[2];
    uint32_t hits[2][2] = {};  // of a row, and of the first or second column of every eight
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bound[half] = row + 8 * half < rows ? just_above(kept.bound[row + 8 * half]) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = column + 8 * j + e;
        const bool counts = c < columns && !(mask && !mask[c]);
        const float more = bias && c < columns ? __ldg(bias + c) : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& sum = s[4 * j + 2 * half + e];
          if (bias) sum += more;
          // "Not below" lets NaN pass.
          const bool hit = counts && !(score(sum) < bound[half]);
          hits[half][e] |= hit ? 1u << j : 0u;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      if (r >= rows) hits[half][0] = hits[half][1] = 0;
      unsigned at = reserve(r, __popc(hits[half][0]) + __popc(hits[half][1]));
      if ((hits[half][0] | hits[half][1]) == 0) continue;
      uint64_t* list = kept.entries + int64_t{r} * kept.capacity;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // A lane mostly has none or one in a tile, so the warp comes by here once or twice.
#pragma unroll 1
        for (uint32_t left = hits[half][e]; left != 0; left &= left - 1) {
          const int j = __ffs(static_cast<int>(left)) - 1;
          float value = s[2 * half + e];
#pragma unroll
          for (int i = 1; i < kEights; ++i) {
            if (i == j) value = s[4 * i + 2 * half + e];
          }
          append(list, at++, opaque(value), first_column + column + 8 * j + e);
        }
      }
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
