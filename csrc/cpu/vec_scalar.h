// One lane, in plain C: the portable level, and the meaning of the wider ones.
#pragma once

#include "dither.h"
#include "types.h"

namespace fastsae::cpu {
namespace {

template <class Number>
struct ScalarVec {
  using A = Number;
  static constexpr int kWidth = 1;
  static constexpr int kAccumulators = 8;  // that fit the registers along with operands
  static constexpr int kTileLatents = 4, kTileVectors = 2;  // see tile_impl.h
  A v;

  template <class T>
  static ScalarVec load(const T* p) {
    return {static_cast<A>(widen(*p))};
  }
  static ScalarVec set1(A x) { return {x}; }
  template <class T>
  void store(T* p) const {
    *p = narrow<T>(v);
  }
  static void load_pair(const bf16* p, ScalarVec& even, ScalarVec& odd) {
    even.v = widen(p[0]);
    odd.v = widen(p[1]);
  }
  static void store_pair(bf16* p, ScalarVec even, ScalarVec odd) {
    p[0] = narrow<bf16>(even.v);
    p[1] = narrow<bf16>(odd.v);
  }
  // The same of numbers of the type of sums.
  static void load_pair(const A* p, ScalarVec& even, ScalarVec& odd) {
    even.v = p[0];
    odd.v = p[1];
  }
  static void store_pair(A* p, ScalarVec even, ScalarVec odd) {
    p[0] = even.v;
    p[1] = odd.v;
  }
  friend ScalarVec operator+(ScalarVec a, ScalarVec b) { return {a.v + b.v}; }
  friend ScalarVec operator-(ScalarVec a, ScalarVec b) { return {a.v - b.v}; }
  friend ScalarVec operator*(ScalarVec a, ScalarVec b) { return {a.v * b.v}; }
  friend ScalarVec operator/(ScalarVec a, ScalarVec b) { return {a.v / b.v}; }
  static ScalarVec sqrt(ScalarVec a) {
    if constexpr (sizeof(A) == sizeof(float)) return {__builtin_sqrtf(a.v)};
    else return {__builtin_sqrt(a.v)};
  }
  static ScalarVec fma(ScalarVec a, ScalarVec b, ScalarVec c) { return {a.v * b.v + c.v}; }
  // The larger of the two; `best` where x is NaN.
  static ScalarVec max(ScalarVec x, ScalarVec best) { return {x.v > best.v ? x.v : best.v}; }
  using Mask = bool;
  static Mask not_below_or_equal(ScalarVec a, ScalarVec b) { return !(a.v <= b.v); }
  static Mask above(ScalarVec a, ScalarVec b) { return a.v > b.v; }
  // Where x is larger than `best`, or NaN and `best` is not.
  static Mask wins(ScalarVec x, ScalarVec best) { return best.v == best.v && !(x.v <= best.v); }
  static ScalarVec select(Mask m, ScalarVec a, ScalarVec b) { return m ? a : b; }
  static ScalarVec abs(ScalarVec a) {
    if constexpr (sizeof(A) == sizeof(float)) return {__builtin_fabsf(a.v)};
    else return {__builtin_fabs(a.v)};
  }
  static unsigned bits(Mask m) { return m; }
  static bool none(Mask a, Mask b, Mask c, Mask d) { return !(a || b || c || d); }
  static int compress(ScalarVec x, unsigned mask, int32_t base, A* values, int32_t* indices) {
    if (!mask) return 0;
    *values = x.v;
    *indices = base;
    return 1;
  }
  A sum() const { return v; }

  // The random bits of columns c, c + 1, ... of a row.
  using Noise = uint32_t;
  static Noise noise(DitherKey key, uint32_t c) { return dither(key, c); }
  static Noise upper(Noise bits) { return bits >> 16; }
  // Stores the number rounded stochastically by the lower half of the bits.
  void store_dithered(bf16* p, Noise bits) const {
    p->bits = dithered(float_to_bits(v), bits & 0xffffu);
  }

  // Integers that order like the values: NaN largest, -0 equal to +0.
  using Key = decltype(order_key(Number(0)));
  void store_keys(Key* out) const { *out = order_key(v); }
  static unsigned at_least(const Key* keys, Key bound) { return *keys >= bound; }
};

using VecF = ScalarVec<float>;
using VecD = ScalarVec<double>;

inline void prefetch(const void* p) {
  __builtin_prefetch(p);
}
inline void prefetch_to_l2(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

}  // namespace
}  // namespace fastsae::cpu
