// Consecutive numbers as one access moves them: 16 bytes, or one element.
#pragma once

#include <type_traits>

#include "cuda/number.cuh"

namespace fastsae::cuda {

// What one access reads: 16 bytes, or one element where rows do not start at multiples of 16 bytes.
template <class F, bool kWide>
struct Pack {
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  static constexpr int kSize = kWide ? F::kVector : 1;
  using Raw = std::conditional_t<kWide, uint4, Bits>;

  __device__ __forceinline__ static Raw load(const Bits* p) {
    if constexpr (kWide) return load_shared_by_all(p);
    else return __ldg(p);
  }
  // Read once: it should not push anything out of the caches.
  __device__ __forceinline__ static Raw load_stream(const Bits* p) {
    if constexpr (kWide) return load_once(p);
    else return *p;
  }
  // For memory that this kernel also writes.
  __device__ __forceinline__ static Raw load_own(const Bits* p) {
    return *reinterpret_cast<const Raw*>(p);
  }
  __device__ __forceinline__ static Bits bits(const Raw& raw, int e) {
    if constexpr (kWide) return element<F>(raw, e);
    else return raw;
  }
  __device__ __forceinline__ static Acc at(const Raw& raw, int e) { return F::widen(bits(raw, e)); }
  __device__ __forceinline__ static void store(Bits* p, const Acc (&x)[kSize]) {
    if constexpr (!kWide) {
      *p = F::narrow(x[0]);
    } else {
      uint32_t word[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(Bits) == 2) {
          word[w] = F::narrow(x[2 * w]) | static_cast<uint32_t>(F::narrow(x[2 * w + 1])) << 16;
        } else if constexpr (sizeof(Bits) == 4) {
          word[w] = F::narrow(x[w]);
        } else {
          word[w] = static_cast<uint32_t>(F::narrow(x[w / 2]) >> (w % 2 * 32));
        }
      }
      *reinterpret_cast<uint4*>(p) = {word[0], word[1], word[2], word[3]};
    }
  }
};

// bfloat16 numbers, as many as a Pack<Float32, kWide> has: 8 bytes, or one.
template <bool kWide>
struct HalfPack {
  using Bits = BFloat16::Bits;
  static constexpr int kSize = kWide ? Float32::kVector : 1;
  using Raw = std::conditional_t<kWide, uint2, Bits>;

  // For memory that this kernel also writes.
  __device__ __forceinline__ static Raw load_own(const Bits* p) {
    return *reinterpret_cast<const Raw*>(p);
  }
  __device__ __forceinline__ static float at(const Raw& raw, int e) {
    if constexpr (kWide) return number<BFloat16>(e < 2 ? raw.x : raw.y, e % 2);
    else return BFloat16::widen(raw);
  }
  // x rounded to nearest, ties to even.
  __device__ __forceinline__ static void store(Bits* p, const float (&x)[kSize]) {
    Bits bits[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) bits[e] = BFloat16::narrow(x[e]);
    store(p, bits);
  }
  __device__ __forceinline__ static void store(Bits* p, const Bits (&bits)[kSize]) {
    if constexpr (kWide) {
      *reinterpret_cast<uint2*>(p) = {bits[0] | static_cast<uint32_t>(bits[1]) << 16,
                                      bits[2] | static_cast<uint32_t>(bits[3]) << 16};
    } else {
      *p = bits[0];
    }
  }
};

}  // namespace fastsae::cuda
