// Stochastic rounding to bfloat16: up or down with probabilities that make the mean the number
// itself. An average that moves by less than half a unit in the last place would stay where it is
// under rounding to nearest.
//
// The random bits are a function of seed, step, matrix, row and column, so that every device and
// number of threads draws the same ones. No torch, no CUDA, no standard library: files with flags
// of their own include it.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FASTSAE_ANYWHERE __host__ __device__
#else
#define FASTSAE_ANYWHERE
#endif

namespace fastsae {

// Of one row in one step.
struct DitherKey {
  uint32_t a, b;
};

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ull;  // 2^64 over the golden ratio, odd

// The finalizer of SplitMix64 (Steele et al. 2014): a permutation in which every bit counts.
FASTSAE_ANYWHERE static inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

FASTSAE_ANYWHERE static inline uint64_t dither_of_step(int64_t seed, int64_t step) {
  return mixed(mixed(static_cast<uint64_t>(seed) + kGolden) +
               static_cast<uint64_t>(step) * kGolden);
}

// matrix: 0 for W_enc, 1 for W_dec.
FASTSAE_ANYWHERE static inline DitherKey dither_of_row(uint64_t of_step, int64_t row, int matrix) {
  const uint64_t x =
      mixed(of_step + (2 * static_cast<uint64_t>(row) + static_cast<uint64_t>(matrix)) * kGolden);
  return {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
}

// Constants of the finalizer of MurmurHash3 (Appleby), with the key in its rounds.
constexpr uint32_t kDither1 = 0x85ebca6bu, kDither2 = 0xc2b2ae35u;

// The bits of one column: the lower half for the first average, the upper one for the second.
FASTSAE_ANYWHERE static inline uint32_t dither(DitherKey key, uint32_t column) {
  uint32_t x = column ^ key.a;
  x = (x ^ (x >> 16)) * kDither1 ^ key.b;
  x = (x ^ (x >> 13)) * kDither2;
  return x ^ (x >> 16);
}

// The number with these bits as bfloat16, up with the share of `noise` < 2^16 below the bits that
// are cut off. A NaN stays a NaN.
FASTSAE_ANYWHERE static inline uint16_t dithered(uint32_t bits, uint32_t noise) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + noise) >> 16);
}

}  // namespace fastsae

#undef FASTSAE_ANYWHERE
