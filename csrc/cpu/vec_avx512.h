// Sixteen floats or eight doubles. Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq only.
#pragma once

#include <immintrin.h>

#include "dither.h"
#include "types.h"

namespace fastsae::cpu {
namespace {

struct VecF {
  using A = float;
  static constexpr int kWidth = 16;
  static constexpr int kAccumulators = 24;  // that fit the registers along with operands
  static constexpr int kTileLatents = 12, kTileVectors = 2;  // see tile_impl.h
  __m512 v;

  static VecF set1(float x) { return {_mm512_set1_ps(x)}; }
  static VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecF load(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  static VecF load(const fp16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
  }
  // 32 entries as the even and the odd ones: two instructions where two loads take four.
  static void load_pair(const bf16* p, VecF& even, VecF& odd) {
    const __m512i u = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(-65536)));
  }
  static void store_pair(bf16* p, VecF even, VecF odd) {
    const __m512i high = _mm512_and_si512(odd.rounded(), _mm512_set1_epi32(-65536));
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(even.rounded(), 16), high));
  }
  // The same of floats.
  static void load_pair(const float* p, VecF& even, VecF& odd) {
    const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even.v = _mm512_permutex2var_ps(a, at, b);
    odd.v = _mm512_permutex2var_ps(a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), b);
  }
  static void store_pair(float* p, VecF even, VecF odd) {
    const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i upper = _mm512_add_epi32(at, _mm512_set1_epi32(8));
    _mm512_storeu_ps(p, _mm512_permutex2var_ps(even.v, at, odd.v));
    _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(even.v, upper, odd.v));
  }
  // The bits with the upper half rounded to nearest, ties to even; a NaN stays a NaN.
  __m512i rounded() const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return plus(_mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  // The bits plus those; a NaN stays a NaN.
  __m512i plus(__m512i addend) const {
    const __m512i u = _mm512_castps_si512(v), up = _mm512_add_epi32(u, addend);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x400000));
  }
  // The random bits of columns c, c + 1, ... of a row: dither() of each.
  using Noise = __m512i;
  static Noise noise(DitherKey key, uint32_t c) {
    const auto all = [](uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); };
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i x = _mm512_xor_si512(_mm512_add_epi32(all(c), lanes), all(key.a));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_xor_si512(_mm512_mullo_epi32(x, all(kDither1)), all(key.b));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 13));
    x = _mm512_mullo_epi32(x, all(kDither2));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  }
  static Noise upper(Noise bits) { return _mm512_srli_epi32(bits, 16); }
  // Stores numbers rounded stochastically by the lower half of the bits.
  void store_dithered(bf16* p, Noise bits) const {
    const __m512i up = plus(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
  }
  void store(fp16* p) const {
    const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
  }
  friend VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
  static VecF sqrt(VecF a) { return {_mm512_sqrt_ps(a.v)}; }
  static VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // vmaxps returns its second operand when either is NaN.
  static VecF max(VecF x, VecF best) { return {_mm512_max_ps(x.v, best.v)}; }
  using Mask = __mmask16;
  static Mask not_below_or_equal(VecF a, VecF b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ);
  }
  static Mask above(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  // Where x is larger than `best`, or NaN and `best` is not.
  static Mask wins(VecF x, VecF best) {
    const Mask ordered = _mm512_cmp_ps_mask(best.v, best.v, _CMP_ORD_Q);
    return _mm512_mask_cmp_ps_mask(ordered, x.v, best.v, _CMP_NLE_UQ);
  }
  static VecF select(Mask m, VecF a, VecF b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
  static VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
  static unsigned bits(Mask m) { return m; }
  static bool none(Mask a, Mask b, Mask c, Mask d) {
    return _kortestz_mask16_u8(_kor_mask16(a, b), _kor_mask16(c, d));
  }
  // Compressed in a register and stored whole: compressing into memory is microcoded on Zen 4.
  static int compress(VecF x, unsigned mask, int32_t base, float* values, int32_t* indices) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(base));
    const __mmask16 m = static_cast<__mmask16>(mask);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m, x.v));
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(m, at));
    return __builtin_popcount(mask);
  }
  float sum() const { return _mm512_reduce_add_ps(v); }

  // Integers that order like the values: NaN largest, -0 equal to +0.
  using Key = int32_t;
  void store_keys(Key* out) const {
    const __m512 x = _mm512_add_ps(v, _mm512_setzero_ps());  // -0 + 0 = +0
    const __m512i u = _mm512_castps_si512(x);
    const __m512i magnitude = _mm512_srli_epi32(_mm512_srai_epi32(u, 31), 1);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i key = _mm512_xor_si512(u, magnitude);
    _mm512_storeu_si512(out, _mm512_mask_mov_epi32(key, nan, _mm512_set1_epi32(0x7fffffff)));
  }
  static unsigned at_least(const Key* keys, Key bound) {
    return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(bound));
  }
};

struct VecD {
  using A = double;
  static constexpr int kWidth = 8;
  static constexpr int kAccumulators = 24;  // that fit the registers along with operands
  static constexpr int kTileLatents = 12, kTileVectors = 2;  // see tile_impl.h
  __m512d v;

  static VecD set1(double x) { return {_mm512_set1_pd(x)}; }
  static VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  friend VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend VecD operator/(VecD a, VecD b) { return {_mm512_div_pd(a.v, b.v)}; }
  static VecD sqrt(VecD a) { return {_mm512_sqrt_pd(a.v)}; }
  static VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static VecD max(VecD x, VecD best) { return {_mm512_max_pd(x.v, best.v)}; }
  using Mask = __mmask8;
  static Mask not_below_or_equal(VecD a, VecD b) {
    return _mm512_cmp_pd_mask(a.v, b.v, _CMP_NLE_UQ);
  }
  static Mask above(VecD a, VecD b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }
  // Where x is larger than `best`, or NaN and `best` is not.
  static Mask wins(VecD x, VecD best) {
    const Mask ordered = _mm512_cmp_pd_mask(best.v, best.v, _CMP_ORD_Q);
    return _mm512_mask_cmp_pd_mask(ordered, x.v, best.v, _CMP_NLE_UQ);
  }
  static VecD select(Mask m, VecD a, VecD b) { return {_mm512_mask_blend_pd(m, b.v, a.v)}; }
  static VecD abs(VecD a) { return {_mm512_abs_pd(a.v)}; }
  static unsigned bits(Mask m) { return m; }
  static bool none(Mask a, Mask b, Mask c, Mask d) {
    return _kortestz_mask8_u8(_kor_mask8(a, b), _kor_mask8(c, d));
  }
  static int compress(VecD x, unsigned mask, int32_t base, double* values, int32_t* indices) {
    const __m256i at =
        _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(base));
    const __mmask8 m = static_cast<__mmask8>(mask);
    _mm512_storeu_pd(values, _mm512_maskz_compress_pd(m, x.v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices), _mm256_maskz_compress_epi32(m, at));
    return __builtin_popcount(mask);
  }
  double sum() const { return _mm512_reduce_add_pd(v); }

  using Key = int64_t;
  void store_keys(Key* out) const {
    const __m512d x = _mm512_add_pd(v, _mm512_setzero_pd());
    const __m512i u = _mm512_castpd_si512(x);
    const __m512i magnitude = _mm512_srli_epi64(_mm512_srai_epi64(u, 63), 1);
    const __mmask8 nan = _mm512_cmp_pd_mask(x, x, _CMP_UNORD_Q);
    const __m512i key = _mm512_xor_si512(u, magnitude);
    _mm512_storeu_si512(out, _mm512_mask_mov_epi64(key, nan, _mm512_set1_epi64(INT64_MAX)));
  }
  static unsigned at_least(const Key* keys, Key bound) {
    return _mm512_cmpge_epi64_mask(_mm512_loadu_si512(keys), _mm512_set1_epi64(bound));
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
