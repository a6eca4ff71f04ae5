// The sums of the product on Hopper that pass a test: what the epilogues that select have in
// common.
#pragma once

#include "cuda/hopper_product_kernel.cuh"

namespace fastsae::cuda {

// Of a thread: a bit for each sum.
struct Hits {
  static constexpr int kEights = kProductColumns / 8;  // 2 columns of each, in 2 rows

  uint32_t bits[2][2] = {};  // of a row, and of the first or second column of every eight

  // Adds the bias, and marks what passes(half, c, sum) says of columns c < columns where the mask
  // is true; `half`: of the two rows.
  template <class Passes>
  __device__ __forceinline__ void mark(float (&s)[kSums], int column, int columns,
                                       const float* bias, const bool* mask, Passes&& passes) {
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
          const bool hit = counts && passes(half, c, sum);
          bits[half][e] |= hit ? 1u << j : 0u;
        }
      }
    }
  }

  __device__ __forceinline__ int count(int half) const {
    return __popc(bits[half][0]) + __popc(bits[half][1]);
  }
  __device__ __forceinline__ void forget(int half) { bits[half][0] = bits[half][1] = 0; }

  // Calls f(sum, j, e) for the hits of a row, of column 8 j + e from the thread's first one on.
  template <class Call>
  __device__ __forceinline__ void for_each(const float (&s)[kSums], int half, Call&& f) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // A lane mostly has none or one in a tile, so the warp comes by here once or twice.
#pragma unroll 1
      for (uint32_t left = bits[half][e]; left != 0; left &= left - 1) {
        const int j = __ffs(static_cast<int>(left)) - 1;
        float value = s[2 * half + e];
#pragma unroll
        for (int i = 1; i < kEights; ++i) {
          if (i == j) value = s[4 * i + 2 * half + e];
        }
        f(opaque(value), j, e);
      }
    }
  }
};

}  // namespace fastsae::cuda
