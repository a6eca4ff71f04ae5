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

// Hands out parts of the scratch; with no memory it only counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* part = memory_ ? reinterpret_cast<T*>(memory_ + size_) : nullptr;
    size_ += aligned(count * static_cast<int64_t>(sizeof(T)));
    return part;
  }
  int64_t size() const { return size_; }

 private:
  char* memory_;
  int64_t size_ = 0;
};

}  // namespace fastsae::cuda
