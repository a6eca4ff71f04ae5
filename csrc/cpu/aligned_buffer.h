// Scratch that starts at a cache line and is not initialized when it grows.
#pragma once

#include <cstdlib>
#include <new>

namespace fastsae::cpu {

template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { std::free(data_); }

  // Room for `size` elements; what was there is lost if it has to grow.
  T* reserve(int64_t size) {
    if (size > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = size;
    }
    return data_;
  }

  T* data() { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace fastsae::cpu
