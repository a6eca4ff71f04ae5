// The loops that exist once per instruction set, as tables of function pointers.
//
// level_impl.h builds the tables for each of scalar.cpp, avx2.cpp and avx512.cpp;
// kernels<T>() returns the one for the current level. T is the storage type, Acc<T> the type of
// sums.
#pragma once

#include "adam_constants.h"
#include "cpu/isa.h"
#include "dither.h"
#include "types.h"

namespace fastsae::cpu {

// Which entries a filter lets through, for a lower bound b.
enum class Pass {
  kNotBelow,   // !(x <= b): above b, or unordered. A NaN entry passes; a NaN b passes all.
  kAbove,      // x > b: a NaN entry never passes.
  kMagnitude,  // kNotBelow of |x|: of tiles, for one bound per token.
};

template <class T>
struct Kernels {
  using A = Acc<T>;
  using Key = decltype(order_key(A(0)));  // orders like A

  // out[g] = max over j = g (mod groups) of x[j] + bias[j], NaN ignored, -inf for an empty group.
  // bias may be null. groups is a multiple of 64.
  void (*group_max)(const T* x, const A* bias, int64_t n, int64_t groups, A* out);

  // Appends the (value, base + j) of every passing x[j] + bias[j], j ascending; returns how many.
  // lower_bound is one number, or one per column when `per_column`. The outputs have room for
  // n + 64.
  int64_t (*filter)(const T* x, const A* bias, int64_t n, const A* lower_bound, bool per_column,
                    Pass pass, int32_t base, A* values, int32_t* indices);

  // Keeps the k largest of n candidates in place, in order; the first ones among equals. Returns
  // the smallest value kept. NaN is the largest, -0 equals +0. 1 <= k <= n; keys [n] is scratch.
  A (*keep_largest)(A* values, int32_t* indices, int64_t n, int64_t k, Key* keys);

  // A number that at least k of n values reach: the k-th largest, or one just below it.
  A (*kth_bound)(const A* values, int64_t n, int64_t k, Key* keys);

  // out[d] = bias[d] + sum over j < count of weights[j] rows[indices[j]][d], j ascending.
  // bias may be null. The rows of indices [count, listed) are needed next; listed = 0 if all rows
  // are in a cache and nothing should be fetched ahead.
  void (*gather_sum)(const A* weights, const int32_t* indices, int64_t count, int64_t listed,
                     const T* rows, int64_t d, const T* bias, T* out);

  // The same with bias and out in the type of sums.
  void (*gather_sum_wide)(const A* weights, const int32_t* indices, int64_t count, int64_t listed,
                          const T* rows, int64_t d, const A* bias, A* out);

  // out[0, n) = x in the type of sums.
  void (*widen_row)(const T* x, int64_t n, A* out);

  // out[j] = <x, rows[indices[j]]> for j < count.
  void (*gather_dot)(const T* x, const int32_t* indices, int64_t count, const T* rows, int64_t d,
                     A* out);

  // The same with x in the type of sums.
  void (*gather_dot_wide)(const A* x, const int32_t* indices, int64_t count, const T* rows,
                          int64_t d, A* out);

  // widen_row, and best[j] = the larger of best[j] and x[j]; best[j] where x[j] is NaN.
  void (*widen_max)(const T* x, int64_t n, A* out, A* best);

  // Maxima of the entries x[j] + bias[j] in sets of eight, as many as whole chunks of them fit in
  // n; returns how many. A set with a NaN may have a NaN instead. Room for n / 8.
  int64_t (*lane_max)(const T* x, const A* bias, int64_t n, A* maxima);

  // `filter` of the 8 count entries with these maxima, for one bound and kNotBelow: reads only
  // chunks that may hold an entry that passes.
  int64_t (*filter_chunks)(const T* x, const A* bias, int64_t count, const A* maxima,
                           const A* lower_bound, int32_t base, A* values, int32_t* indices);
};

// What encoders do to rows of pre-activations, each of one latent and n tokens. Row r of several
// starts at x + r * stride.
template <class A>
struct LatentKernels {
  // best[t] = the largest of itself and of `rows` rows at t, and at[t] = first + r if that is of
  // row r; the first one among equals. NaN is the largest, -0 equals +0.
  void (*max_rows)(const A* x, int64_t rows, int64_t stride, int64_t n, int32_t first, A* best,
                   int32_t* at);

  // total[t] += sum over rows of |x[t]|.
  void (*add_magnitudes)(const A* x, int64_t rows, int64_t stride, int64_t n, A* total);

  // out[t] = relu(z[t]) * (base[t] + |effect[t]|).
  void (*score)(const A* z, const A* effect, const A* base, int64_t n, A* out);

  // The sum of relu(x[t]), or of its squares.
  A (*sum_positive)(const A* x, int64_t n, bool squares);

  // The sum of x[t] log x[t] over positive x[t].
  A (*sum_log)(const A* x, int64_t n);
};

// The encoder's matmul: a tile of `latents` rows w against a panel of `tokens` packed columns x,
// in words that are numbers of type A or pairs of bfloat16.
template <class W>
struct TileKernels {
  using A = Acc<W>;
  int64_t latents, tokens;

  // out[l * out_stride + t] = <w[l], x[t]> + bias[l]; w has row stride `stride`, x holds word p of
  // token t at p * tokens + t.
  void (*store)(const W* w, int64_t stride, const W* x, int64_t depth, const A* bias, A* out,
                int64_t out_stride);

  // The same without a bias, added to what is there if `add`; w holds word p of latent l at
  // p * latents + l.
  void (*add)(const W* w, const W* x, int64_t depth, bool add, A* out, int64_t out_stride);

  // Appends (value, l * tokens + t) of those that pass lower_bound[t], or lower_bound[l] if
  // `per_latent` (then always kAbove), l ascending; returns how many. Room for latents * tokens
  // + 64.
  int64_t (*filter)(const W* w, int64_t stride, const W* x, int64_t depth, const A* bias,
                    const A* lower_bound, bool per_latent, Pass pass, A* values, int32_t* codes);
};

// One row of d numbers at a time; A is float or double.
template <class A>
struct AdamKernels {
  A (*row_dot)(const A* a, const A* b, int64_t d);
  void (*add_scaled)(A* y, const A* x, A a, int64_t d);  // y += a x
  void (*scale_row)(A* x, A a, int64_t d);
  void (*narrow_row)(const A* x, int64_t d, bf16* out);  // rounded to nearest, ties to even
  // An Adam step of p with gradient scale * g, or 0 if g is null; returns the new <p, p>.
  A (*adam_row)(A* p, A* m, A* v, const A* g, A scale, int64_t d, const AdamConstants<A>& s);
  // The same with averages in bfloat16, rounded stochastically; null for double.
  A (*adam_row_bf16)(A* p, bf16* m, bf16* v, const A* g, A scale, int64_t d,
                     const AdamConstants<A>& s, DitherKey key);
  // adam_row with one number for all squares: v is that of the row.
  A (*adam_mini_row)(A* p, A* m, A* v, const A* g, A scale, int64_t d, const AdamConstants<A>& s);
};

// The tables of one level, defined by level_impl.h.
template <Isa level>
struct Level {
  template <class T>
  static const Kernels<T>& table();
  template <class W>
  static const TileKernels<W>& tile();
  template <class A>
  static const LatentKernels<A>& latents();
  template <class A>
  static const AdamKernels<A>& adam();
};

namespace avx512_bf16 {
const TileKernels<bf16x2>& tile();
void round_row(const float* x, int64_t n, bf16x2* out);
}  // namespace avx512_bf16

// Those of the current level.
template <class T>
const Kernels<T>& kernels();

template <class A>
const LatentKernels<A>& latent_kernels();

template <class A>
const AdamKernels<A>& adam_kernels();

// W: float, double or bf16x2.
template <class W>
const TileKernels<W>& tile_kernels();
// Whether tile_kernels<bf16x2>() and round_row exist at the current level.
bool has_bf16_tile();
// out = x [n] rounded to bfloat16, with a 0 at the end if n is odd.
void round_row(const float* x, int64_t n, bf16x2* out);

}  // namespace fastsae::cpu
