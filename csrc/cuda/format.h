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
class Layout {
 public:
  // The offset of the next `bytes` bytes.
  int64_t add(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += aligned(bytes);
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace fastsae::cuda
