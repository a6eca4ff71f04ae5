// Bounds from samples, on any device. No torch, no CUDA.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastsae {

// The rank in a sample of `size` of `total` entries whose value somewhat more than `budget` of all
// entries reach: 25 % and four standard deviations more than expected. Of nothing: `size`, which
// says that no entry of the sample is of that rank.
inline int64_t sample_rank(int64_t budget, int64_t size, int64_t total) {
  if (size <= 0 || total <= 0) return size;
  const double expected =
      static_cast<double>(budget) * static_cast<double>(size) / static_cast<double>(total);
  return static_cast<int64_t>(1.25 * expected + 4.0 * std::sqrt(expected)) + 8;
}

}  // namespace fastsae
