// What an operator and its launcher agree on: the storage formats. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace fastsae::cuda {

enum class Format { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Hands out parts of a launcher's scratch, each at a multiple of 256 bytes; with no memory it only
// counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* part = memory_ ? reinterpret_cast<T*>(memory_ + size_) : nullptr;
    constexpr int64_t kAlignment = 256;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }
  int64_t size() const { return size_; }

 private:
  char* memory_;
  int64_t size_ = 0;
};

}  // namespace fastsae::cuda
