// The loops that exist once per instruction set, as tables of function pointers.
//
// A table is built by each of scalar.cpp, avx2.cpp and avx512.cpp from the same *_impl.h sources;
// kernels<T>() returns the one for the current ISA. T is the storage type, Acc<T> the type of sums.
#pragma once

#include "cpu/types.h"

namespace fastsae::cpu {

// Which entries a filter lets through, for a threshold tau.
enum class Pass {
  kNotBelow,  // !(x <= tau): above tau, or unordered. A NaN entry passes; a NaN tau passes all.
  kAbove,     // x > tau: a NaN entry never passes.
};

template <class T>
struct Kernels {
  using A = Acc<T>;
  using Key = decltype(order_key(A(0)));  // orders like A

  // out[g] = max over j = g (mod groups) of x[j] + bias[j], NaN ignored, -inf for an empty group.
  // bias may be null. groups is a multiple of 64.
  void (*group_max)(const T* x, const A* bias, int64_t n, int64_t groups, A* out);

  // Appends the (value, base + j) of every passing x[j] + bias[j], j ascending; returns how many.
  // tau is one number, or one per column when `per_column`. The outputs have room for n + 64.
  int64_t (*filter)(const T* x, const A* bias, int64_t n, const A* tau, bool per_column, Pass pass,
                    int32_t base, A* values, int32_t* indices);

  // Keeps the k largest of n candidates in place, in order; the first ones among equals. Returns
  // the smallest value kept. NaN is the largest, -0 equals +0. 1 <= k <= n; keys [n] is scratch.
  A (*keep_largest)(A* values, int32_t* indices, int64_t n, int64_t k, Key* keys);

  // A number that at least k of n values reach: the k-th largest, or one just below it.
  A (*kth_bound)(const A* values, int64_t n, int64_t k, Key* keys);

  // out[d] = bias[d] + sum over j < count of weights[j] rows[indices[j]][d], j ascending.
  // bias may be null. The rows of indices [count, known) are wanted next; known = 0 if all rows are
  // in a cache and nothing should be fetched ahead.
  void (*gather_sum)(const A* weights, const int32_t* indices, int64_t count, int64_t known,
                     const T* rows, int64_t d, const T* bias, T* out);

  // out[0, n) = x in the type of sums.
  void (*widen_row)(const T* x, int64_t n, A* out);

  // out[j] = <x, rows[indices[j]]> for j < count.
  void (*gather_dot)(const T* x, const int32_t* indices, int64_t count, const T* rows, int64_t d,
                     A* out);

  // widen_row, and best[j] = the larger of best[j] and x[j]; best[j] where x[j] is NaN.
  void (*widen_max)(const T* x, int64_t n, A* out, A* best);
};

// The encoder's product: a tile of `latents` rows w against a panel of `tokens` packed columns x,
// in words that are numbers of type A or pairs of bfloat16.
template <class W>
struct TileKernels {
  using A = Acc<W>;
  int64_t latents, tokens;

  // out[l * out_stride + t] = <w[l], x[t]> + bias[l]; w has row stride `stride`, x holds word p of
  // token t at p * tokens + t.
  void (*store)(const W* w, int64_t stride, const W* x, int64_t depth, const A* bias, A* out,
                int64_t out_stride);

  // Appends (value, l * tokens + t) of those that pass tau[t], or tau[l] if `per_latent` (then
  // always kAbove), l ascending; returns how many. Room for latents * tokens + 64.
  int64_t (*filter)(const W* w, int64_t stride, const W* x, int64_t depth, const A* bias,
                    const A* tau, bool per_latent, Pass pass, A* values, int32_t* codes);
};

// Constants of one Adam step.
template <class A>
struct AdamScalars {
  A one_minus_beta1, beta2, one_minus_beta2;
  A step_size;            // lr / (1 - beta1^t)
  A inverse_correction2;  // 1 / sqrt(1 - beta2^t)
  A eps;
};

// One row of d numbers at a time; A is float or double.
template <class A>
struct AdamKernels {
  A (*row_dot)(const A* a, const A* b, int64_t d);
  void (*add_scaled)(A* y, const A* x, A a, int64_t d);  // y += a x
  void (*scale_row)(A* x, A a, int64_t d);
  // An Adam step of p with gradient scale * g, or 0 if g is null; returns the new <p, p>.
  A (*adam_row)(A* p, A* m, A* v, const A* g, A scale, int64_t d, const AdamScalars<A>& s);
};

namespace scalar {
template <class T>
const Kernels<T>& table();
template <class W>
const TileKernels<W>& tile();
template <class A>
const AdamKernels<A>& adam();
}  // namespace scalar
namespace avx2 {
template <class T>
const Kernels<T>& table();
template <class W>
const TileKernels<W>& tile();
template <class A>
const AdamKernels<A>& adam();
}  // namespace avx2
namespace avx512 {
template <class T>
const Kernels<T>& table();
template <class W>
const TileKernels<W>& tile();
template <class A>
const AdamKernels<A>& adam();
const TileKernels<bf16x2>& bf16_tile();
void round_row(const float* x, int64_t n, bf16x2* out);
}  // namespace avx512

template <class T>
const Kernels<T>& kernels();

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
