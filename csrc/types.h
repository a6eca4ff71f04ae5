// Storage types that C++ lacks, the type that sums over them are kept in, and how numbers order.
// Included by the files that have flags of their own: everything here has internal linkage or no
// code, and there is no standard library.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastsae {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct bf16x2 {
  uint32_t bits;  // the first one in the lower half
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

static inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

static inline float widen(float x) {
  return x;
}
static inline double widen(double x) {
  return x;
}
static inline float widen(bf16 x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}
static inline float widen(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifting the exponent into place scales a half by 2^-112, subnormals included.
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  return bits_to_float(sign | float_to_bits(scaled));
}

// Signed integers that order like the values: NaN largest, -0 equal to +0.
static inline int32_t order_key(float x) {
  int32_t u;
  x += 0.0f;  // -0 + 0 = +0
  memcpy(&u, &x, sizeof u);
  return x != x ? INT32_MAX : u ^ ((u >> 31) & INT32_MAX);
}
static inline int64_t order_key(double x) {
  int64_t u;
  x += 0.0;
  memcpy(&u, &x, sizeof u);
  return x != x ? INT64_MAX : u ^ ((u >> 63) & INT64_MAX);
}

// Round to nearest, ties to even; a NaN stays a NaN.
template <class T>
static inline T narrow(Acc<T> x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  u += 0x7fffu + ((u >> 16) & 1u);
  return {static_cast<uint16_t>(u >> 16)};
}
template <>
inline fp16 narrow<fp16>(float x) {
  const uint32_t u = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the bits of a subnormal half
    const uint32_t r = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (r - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace fastsae
