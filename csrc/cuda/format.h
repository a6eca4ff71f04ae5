// What an operator and its launcher agree on: the storage formats. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace fastsae::cuda {

enum class Format { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Room that a launcher needs besides its outputs, and offsets into it, in units of 256 bytes.
constexpr int64_t kAlignment = 256;
inline int64_t aligned(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace fastsae::cuda
