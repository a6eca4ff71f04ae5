// Storage formats as device code sees them: their bits, the number that these encode (in float, or
// in double for float64), and integer keys that order like the numbers: NaN largest, -0 equal to
// +0.
#pragma once

#include "cuda/format.h"
#include "cuda/platform.cuh"

namespace fastsae::cuda {

// kInf: the bits of +infinity; a larger magnitude is NaN.
template <class BitsType, BitsType kInfBits>
struct Ordered {
  using Bits = BitsType;
  static constexpr int kBits = 8 * sizeof(Bits);
  static constexpr Bits kSign = Bits(1) << (kBits - 1);
  static constexpr Bits kInf = kInfBits;
  // Numbers in 16 bytes.
  static constexpr int kVector = 16 / sizeof(Bits);

  __device__ __forceinline__ static Bits key(Bits bits) {
    const Bits magnitude = bits & static_cast<Bits>(~kSign);
    if (magnitude > kInfBits) return static_cast<Bits>(~Bits(0));
    if (magnitude == 0) return kSign;
    return bits & kSign ? static_cast<Bits>(~bits) : static_cast<Bits>(bits | kSign);
  }

  // Bits with this key: one of them.
  __device__ __forceinline__ static Bits from_key(Bits key) {
    return key & kSign ? static_cast<Bits>(key & ~kSign) : static_cast<Bits>(~key);
  }
};

struct Float32 : Ordered<uint32_t, 0x7f800000u> {
  using Acc = float;
  __device__ __forceinline__ static float widen(Bits bits) { return bits_as<float>(bits); }
  __device__ __forceinline__ static Bits narrow(float x) { return bits_as<Bits>(x); }
  // The larger numbers of two words of 32 bits; NaN loses here, and wins below.
  __device__ __forceinline__ static uint32_t larger(uint32_t a, uint32_t b) {
    return narrow(max_number(widen(a), widen(b)));
  }
  __device__ __forceinline__ static uint32_t larger_or_nan(uint32_t a, uint32_t b) {
    return narrow(max_or_nan(widen(a), widen(b)));
  }
};

struct Float64 : Ordered<uint64_t, 0x7ff0000000000000ull> {
  using Acc = double;
  __device__ __forceinline__ static double widen(Bits bits) { return bits_as<double>(bits); }
  __device__ __forceinline__ static Bits narrow(double x) { return bits_as<Bits>(x); }
};

struct BFloat16 : Ordered<uint16_t, 0x7f80u> {
  using Acc = float;
  __device__ __forceinline__ static float widen(Bits bits) {
    return bits_as<float>(static_cast<uint32_t>(bits) << 16);
  }
  __device__ __forceinline__ static Bits narrow(float x) { return float_to_bfloat16(x); }
  __device__ __forceinline__ static uint32_t larger(uint32_t a, uint32_t b) {
    return max_bfloat16x2(a, b);
  }
  __device__ __forceinline__ static uint32_t larger_or_nan(uint32_t a, uint32_t b) {
    return max_or_nan_bfloat16x2(a, b);
  }
};

struct Float16 : Ordered<uint16_t, 0x7c00u> {
  using Acc = float;
  __device__ __forceinline__ static float widen(Bits bits) { return half_to_float(bits); }
  __device__ __forceinline__ static Bits narrow(float x) { return float_to_half(x); }
  __device__ __forceinline__ static uint32_t larger(uint32_t a, uint32_t b) {
    return max_float16x2(a, b);
  }
  __device__ __forceinline__ static uint32_t larger_or_nan(uint32_t a, uint32_t b) {
    return max_or_nan_float16x2(a, b);
  }
};

// The format of a number that sums are kept in.
template <class A>
struct FormatOf {
  using type = Float32;
};
template <>
struct FormatOf<double> {
  using type = Float64;
};

// Number i of a word of 32 bits.
template <class F>
__device__ __forceinline__ float number(uint32_t word, int i) {
  return F::widen(static_cast<typename F::Bits>(word >> (F::kBits * i)));
}
// Word w of 16 bytes.
__device__ __forceinline__ uint32_t word(const uint4& v, int w) {
  return w == 0 ? v.x : w == 1 ? v.y : w == 2 ? v.z : v.w;
}
// Element e of 16 bytes.
template <class F>
__device__ __forceinline__ typename F::Bits element(const uint4& v, int e) {
  if constexpr (sizeof(typename F::Bits) == 2) {
    return static_cast<uint16_t>(word(v, e >> 1) >> (16 * (e & 1)));
  } else if constexpr (sizeof(typename F::Bits) == 4) {
    return word(v, e);
  } else {
    return e == 0 ? v.x | static_cast<uint64_t>(v.y) << 32 : v.z | static_cast<uint64_t>(v.w) << 32;
  }
}

// Calls f with an object of the format's type.
template <class Call>
auto with_format(Format format, Call&& f) {
  switch (format) {
    case Format::kFloat32:
      return f(Float32{});
    case Format::kFloat64:
      return f(Float64{});
    case Format::kBFloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

// Calls f with objects of the formats of a decoder's rows and of its other numbers: one format, or
// bfloat16 rows among float32.
template <class Call>
auto with_decoder_formats(Format rows, Format others, Call&& f) {
  if (rows != others) return f(BFloat16{}, Float32{});
  return with_format(others, [&](auto format) { return f(format, format); });
}

}  // namespace fastsae::cuda
