// What changes of Adam's constants from step to step, on any device. No torch, no CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "adam_constants.h"
#include "dither.h"

#ifdef __CUDACC__
#define FASTSAE_ANYWHERE __host__ __device__
#else
#define FASTSAE_ANYWHERE
#endif

namespace fastsae {

// base^exponent by squaring: products alone, which every device rounds alike, unlike its pow.
FASTSAE_ANYWHERE inline double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

// The rate of step t, from 1. Below that there is no step. seed: of rounding.
FASTSAE_ANYWHERE inline AdamRate<double> adam_rate(double lr, double beta1, double beta2, int64_t t,
                                                   int64_t seed) {
  if (t < 1) return {0, 0, 0};
  // Volatile: a product that is fused with the subtraction would not be rounded.
  const volatile double power1 = power(beta1, t), power2 = power(beta2, t);
  return {lr / (1.0 - power1), 1.0 / std::sqrt(1.0 - power2), dither_of_step(seed, t)};
}

}  // namespace fastsae

#undef FASTSAE_ANYWHERE
