// Eight floats or four doubles. Compiled with -mavx2 -mfma -mf16c only.
#pragma once

#include <immintrin.h>

#include "dither.h"
#include "types.h"

namespace fastsae::cpu {
namespace {

struct VecF {
  using A = float;
  static constexpr int kWidth = 8;
  static constexpr int kAccumulators = 12;  // that fit the registers along with operands
  static constexpr int kTileLatents = 6, kTileVectors = 2;  // see tile_impl.h
  __m256 v;

  static VecF set1(float x) { return {_mm256_set1_ps(x)}; }
  static VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecF load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static VecF load(const fp16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i h = _mm256_srli_epi32(rounded(), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  // 16 entries as the even and the odd ones: two instructions where two loads take four.
  static void load_pair(const bf16* p, VecF& even, VecF& odd) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(-65536)));
  }
  static void store_pair(bf16* p, VecF even, VecF odd) {
    const __m256i high = _mm256_and_si256(odd.rounded(), _mm256_set1_epi32(-65536));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_or_si256(_mm256_srli_epi32(even.rounded(), 16), high));
  }
  // The same of floats.
  static void load_pair(const float* p, VecF& even, VecF& odd) {
    const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
    const __m256 low = _mm256_permute2f128_ps(a, b, 0x20),
                 high = _mm256_permute2f128_ps(a, b, 0x31);
    even.v = _mm256_shuffle_ps(low, high, 0x88);
    odd.v = _mm256_shuffle_ps(low, high, 0xdd);
  }
  static void store_pair(float* p, VecF even, VecF odd) {
    const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
    _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
  // The bits with the upper half rounded to nearest, ties to even; a NaN stays a NaN.
  __m256i rounded() const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return plus(_mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  // The bits plus those; a NaN stays a NaN.
  __m256i plus(__m256i addend) const {
    const __m256i u = _mm256_castps_si256(v), up = _mm256_add_epi32(u, addend);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, quiet, nan);
  }
  // The random bits of columns c, c + 1, ... of a row: dither() of each.
  using Noise = __m256i;
  static Noise noise(DitherKey key, uint32_t c) {
    const auto all = [](uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); };
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i x = _mm256_xor_si256(_mm256_add_epi32(all(c), lanes), all(key.a));
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
    x = _mm256_xor_si256(_mm256_mullo_epi32(x, all(kDither1)), all(key.b));
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 13));
    x = _mm256_mullo_epi32(x, all(kDither2));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
  }
  static Noise upper(Noise bits) { return _mm256_srli_epi32(bits, 16); }
  // Stores numbers rounded stochastically by the lower half of the bits.
  void store_dithered(bf16* p, Noise bits) const {
    const __m256i up = plus(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff)));
    const __m256i h = _mm256_srli_epi32(up, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(fp16* p) const {
    const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
  }
  friend VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
  static VecF sqrt(VecF a) { return {_mm256_sqrt_ps(a.v)}; }
  static VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  // maxps returns its second operand when either is NaN.
  static VecF max(VecF x, VecF best) { return {_mm256_max_ps(x.v, best.v)}; }
  using Mask = __m256;
  static Mask not_below_or_equal(VecF a, VecF b) { return _mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ); }
  static Mask above(VecF a, VecF b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  // Where x is larger than `best`, or NaN and `best` is not.
  static Mask wins(VecF x, VecF best) {
    const Mask ordered = _mm256_cmp_ps(best.v, best.v, _CMP_ORD_Q);
    return _mm256_and_ps(ordered, _mm256_cmp_ps(x.v, best.v, _CMP_NLE_UQ));
  }
  static VecF select(Mask m, VecF a, VecF b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }
  static VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
  static bool none(Mask a, Mask b, Mask c, Mask d) {
    return bits(_mm256_or_ps(_mm256_or_ps(a, b), _mm256_or_ps(c, d))) == 0;
  }
  static int compress(VecF x, unsigned mask, int32_t base, float* values, int32_t* indices) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x.v);
    int m = 0;
    for (; mask; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      values[m] = lanes[lane];
      indices[m++] = base + lane;
    }
    return m;
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  // Integers that order like the values: NaN largest, -0 equal to +0.
  using Key = int32_t;
  void store_keys(Key* out) const {
    const __m256 x = _mm256_add_ps(v, _mm256_setzero_ps());  // -0 + 0 = +0
    const __m256i u = _mm256_castps_si256(x);
    const __m256i magnitude = _mm256_srli_epi32(_mm256_srai_epi32(u, 31), 1);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i key = _mm256_xor_si256(u, magnitude);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_blendv_epi8(key, _mm256_set1_epi32(0x7fffffff), nan));
  }
  static unsigned at_least(const Key* keys, Key bound) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys));
    const __m256i less = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), k);
    return ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(less))) & 0xffu;
  }
};

struct VecD {
  using A = double;
  static constexpr int kWidth = 4;
  static constexpr int kAccumulators = 12;  // that fit the registers along with operands
  static constexpr int kTileLatents = 6, kTileVectors = 2;  // see tile_impl.h
  __m256d v;

  static VecD set1(double x) { return {_mm256_set1_pd(x)}; }
  static VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  friend VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
  static VecD sqrt(VecD a) { return {_mm256_sqrt_pd(a.v)}; }
  static VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static VecD max(VecD x, VecD best) { return {_mm256_max_pd(x.v, best.v)}; }
  using Mask = __m256d;
  static Mask not_below_or_equal(VecD a, VecD b) { return _mm256_cmp_pd(a.v, b.v, _CMP_NLE_UQ); }
  static Mask above(VecD a, VecD b) { return _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ); }
  // Where x is larger than `best`, or NaN and `best` is not.
  static Mask wins(VecD x, VecD best) {
    const Mask ordered = _mm256_cmp_pd(best.v, best.v, _CMP_ORD_Q);
    return _mm256_and_pd(ordered, _mm256_cmp_pd(x.v, best.v, _CMP_NLE_UQ));
  }
  static VecD select(Mask m, VecD a, VecD b) { return {_mm256_blendv_pd(b.v, a.v, m)}; }
  static VecD abs(VecD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
  static unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
  static bool none(Mask a, Mask b, Mask c, Mask d) {
    return bits(_mm256_or_pd(_mm256_or_pd(a, b), _mm256_or_pd(c, d))) == 0;
  }
  static int compress(VecD x, unsigned mask, int32_t base, double* values, int32_t* indices) {
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, x.v);
    int m = 0;
    for (; mask; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      values[m] = lanes[lane];
      indices[m++] = base + lane;
    }
    return m;
  }
  double sum() const {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }

  using Key = int64_t;
  void store_keys(Key* out) const {
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, v);
    for (int i = 0; i < 4; ++i) out[i] = order_key(lanes[i]);
  }
  static unsigned at_least(const Key* keys, Key bound) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys));
    const __m256i less = _mm256_cmpgt_epi64(_mm256_set1_epi64x(bound), k);
    return ~static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(less))) & 0xfu;
  }
};

inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
inline void prefetch_to_l2(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace
}  // namespace fastsae::cpu
