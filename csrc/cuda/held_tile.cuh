// A tile of a row in registers: the bound that its maxima give, and what passes a bound. Whoever
// fills the tile, from memory or as the result of a GEMM, may use both.
#pragma once

#include "cuda/row_select.cuh"

namespace fastsae::cuda {

// kVectors 16-byte vectors per thread.
template <class F, int kVectors>
struct HeldTile {
  using Bits = typename F::Bits;
  static constexpr int E = F::kVector, kPerWord = 4 / int{sizeof(Bits)};

  uint4 vectors[kVectors] = {};

  // A number that `need` elements of the block's tile reach, from kMaxima maxima per thread.
  // Vector i has elements from start + i step on, those past `tail` do not exist; `single_value` is
  // one more element. Called by the whole block.
  template <int kMaxima>
  __device__ __forceinline__ float bound(float single_value, int start, int step, int tail,
                                         int need, SelectSpace& space) const {
    constexpr int kWords = kMaxima < kPerWord ? 1 : kMaxima / kPerWord;  // of maxima
    constexpr uint32_t kLeast = uint32_t{F::kSign | F::kInf} * (kPerWord == 2 ? 0x10001u : 1u);
    uint32_t words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = kLeast;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (start + i * step >= tail) continue;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        // Passes over NaN: it has no place in a bound.
        words[w % kWords] = F::larger(words[w % kWords], word(vectors[i], w));
      }
    }
    float maxima[kMaxima];
#pragma unroll
    for (int g = 0; g < kMaxima; ++g) maxima[g] = number<F>(words[g / kPerWord], g % kPerWord);
    if constexpr (kMaxima < kPerWord) maxima[0] = max_number(maxima[0], number<F>(words[0], 1));
    maxima[0] = max_number(maxima[0], single_value);
    return group_bound(maxima, need, space);
  }

  // Counts the elements that are not below the bound as candidates: push(place, bits, index).
  // "Not below" lets NaN pass. Vector i has elements from j + i step on.
  template <class Push>
  __device__ __forceinline__ void filter(float lower_bound, int j, int step, int tail,
                                         SelectSpace& space, Push&& push) const {
    unsigned hit = 0;  // the vectors with one: few
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4& v = vectors[i];
      const uint32_t largest =
          F::larger_or_nan(F::larger_or_nan(v.x, v.y), F::larger_or_nan(v.z, v.w));
      const bool low = number<F>(largest, 0) < lower_bound;
      const bool high = number<F>(largest, kPerWord - 1) < lower_bound;
      const bool below = (low & high) | (j + i * step >= tail);
      hit |= below ? 0u : 1u << i;
    }
    // A thread mostly has none or one in a tile, so the warp comes by here once or twice.
#pragma unroll 1
    for (; hit != 0; hit &= hit - 1) {
      const int which = __ffs(static_cast<int>(hit)) - 1, index = j + which * step;
      uint4 v = vectors[0];
#pragma unroll
      for (int i = 1; i < kVectors; ++i) {
        if (i == which) v = vectors[i];
      }
      unsigned hits = 0;
#pragma unroll
      for (int e = 0; e < E; ++e) hits |= F::widen(element<F>(v, e)) < lower_bound ? 0u : 1u << e;
      unsigned at = atomicAdd(&space.candidate_count, static_cast<unsigned>(__popc(hits)));
#pragma unroll 1
      for (; hits != 0; hits &= hits - 1) {
        const int e = __ffs(static_cast<int>(hits)) - 1;
        push(at++, element<F>(v, e), index + e);
      }
    }
  }
};

}  // namespace fastsae::cuda
