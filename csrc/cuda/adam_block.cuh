// What a block of the update does for one latent after another.
#pragma once

#include "cuda/lists.cuh"
#include "cuda/sparse_adam_step.h"
#include "dither.h"

namespace fastsae::cuda {

constexpr int kGroup = 16;  // latents whose shares of the gradient of b_dec are added up together

// Adam, in the type of parameters.
template <class A>
struct Adam : AdamSettings<A> {
  explicit Adam(const AdamSettings<double>& s) : AdamSettings<A>(s.to<A>()) {}

  __device__ __forceinline__ void move(const AdamRate<A>& rate, A g, A& p, A& m, A& v) const {
    m += this->one_minus_beta1 * (g - m);
    v = this->one_minus_beta2 * (g * g) + this->beta2 * v;
    if constexpr (sizeof(A) == sizeof(float)) {
      p -= rate.step_size * close_quotient(m, close_root(v) * rate.inverse_correction2 + this->eps);
    } else {
      p -= rate.step_size * (m / (sqrt(v) * rate.inverse_correction2 + this->eps));
    }
  }
  __device__ __forceinline__ static A square_root(A x) {
    if constexpr (sizeof(A) == sizeof(float)) return sqrtf(x);
    else return sqrt(x);
  }
};

// A parameter and Adam's two averages of it.
template <class F>
struct Parameter {
  typename F::Bits *p, *m, *v;
  explicit Parameter(const ParameterParams& x)
      : p(static_cast<typename F::Bits*>(x.p)),
        m(static_cast<typename F::Bits*>(x.m)),
        v(static_cast<typename F::Bits*>(x.v)) {}
};

// F: the format of parameters; R: of the rows that are gathered.
template <class F, class R>
struct AdamArgs {
  using Bits = typename F::Bits;
  using A = typename F::Acc;
  Parameter<F> W_enc, W_dec, b_enc;
  // One and the same lists: with values for W_dec, with grad_values for W_enc.
  ListsView<R> dec_lists, enc_lists;
  Segments<A> dec_segments, enc_segments;
  const typename R::Bits *grad_rows, *centered_rows;
  const int32_t* extra_rows;  // [d_sae]: row of the extra gradients, or -1; or null
  const Bits *extra_W_enc, *extra_W_dec, *extra_b_enc;
  const Bits* more_b_enc;  // [d_sae]: more of its gradient, or null
  int d_sae, d;
  int packs;              // of a row of parameters
  int row_packs, chunks;  // of a row that is gathered
  Adam<A> adam;
  const AdamRate<A>* rate;
  const A* scale;  // of all gradients, or null: 1
  bool unit_norm;
  Bits* shares;     // [groups, d], or null
  double* squares;  // [groups]: squared norms of gradients
  Bits* rows;       // [blocks, 3 d] for g_dec, g_enc and share, or null: in shared memory
  uint16_t *bf16_W_enc, *bf16_W_dec;  // [d_sae, d]: get the moved rows in bfloat16; or null
};

// Stores moved numbers in a bfloat16 copy of a matrix too, if there is one: of float32 alone.
template <class F, bool kWide>
__device__ __forceinline__ void store_copy(uint16_t* copy, int64_t at,
                                           const typename F::Acc (&p)[Pack<F, kWide>::kSize]) {
  if constexpr (std::is_same_v<F, Float32>) {
    if (copy) HalfPack<kWide>::store(copy + at, p);
  }
}

// The sums of kCount numbers over the block, in a fixed order. Called by the whole block; `space`
// [kCount kThreads / 32] is free again after the next barrier.
template <int kThreads, int kCount, class T>
__device__ __forceinline__ void block_sums(T (&x)[kCount], T* space) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = warp_sum(x[i]);
    if (lane == 0) space[warp * kCount + i] = x[i];
  }
  __syncthreads();  // every warp's sums are there
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = 0;
    for (int w = 0; w < kThreads / 32; ++w) x[i] += space[w * kCount + i];
  }
}

// What happens to a row when its gradient is there.
enum class Move {
  kNone,      // its squared norm is found
  kAdam,      // Adam moves the parameters
  kAdamMini,  // Adam with one average of squares for the row
  kAdamBf16,  // Adam with both averages in bfloat16, rounded stochastically; of float32 alone
};

// The averages of a matrix as they are stored.
template <class F, bool kWide, Move kMove>
struct Averages {
  using A = typename F::Acc;
  using Bits = typename F::Bits;
  using P = Pack<F, kWide>;
  using H = HalfPack<kWide>;
  static constexpr int E = P::kSize;
  static constexpr bool kBf16 = kMove == Move::kAdamBf16;
  using Raw = std::conditional_t<kBf16, typename H::Raw, typename P::Raw>;

  __device__ __forceinline__ static const void* place(const Bits* of, int64_t c) {
    if constexpr (kBf16) return reinterpret_cast<const uint16_t*>(of) + c;
    else return of + c;
  }
  __device__ __forceinline__ static Raw load_own(const Bits* of, int64_t c) {
    if constexpr (kBf16) return H::load_own(reinterpret_cast<const uint16_t*>(of) + c);
    else return P::load_own(of + c);
  }
  __device__ __forceinline__ static A at(const Raw& raw, int e) {
    if constexpr (kBf16) return H::at(raw, e);
    else return P::at(raw, e);
  }
  // Stores both from number c on, which is in this column of a row with this key. Not v of
  // Adam-mini, which is that of a row.
  __device__ __forceinline__ static void store(const Parameter<F>& W, int64_t c, const A (&m)[E],
                                               const A (&v)[E], DitherKey key, int column) {
    if constexpr (kBf16) {
      uint16_t low[E], high[E];
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const uint32_t noise = dither(key, static_cast<uint32_t>(column + e));
        low[e] = dithered(F::narrow(m[e]), noise & 0xffffu);
        high[e] = dithered(F::narrow(v[e]), noise >> 16);
      }
      H::store(reinterpret_cast<uint16_t*>(W.m) + c, low);
      H::store(reinterpret_cast<uint16_t*>(W.v) + c, high);
    } else {
      P::store(W.m + c, m);
      if constexpr (kMove == Move::kAdam) P::store(W.v + c, v);
    }
  }
};

template <class F, class R, bool kWide, int kPacks, int kThreads, Move kMove>
struct AdamBlock {
  using A = typename F::Acc;
  using Bits = typename F::Bits;
  using P = Pack<F, kWide>;
  using S = Strip<R, kWide, kPacks>;
  static constexpr int E = P::kSize, kWarps = kThreads / 32;
  static constexpr bool kMini = kMove == Move::kAdamMini;
  static constexpr bool kBf16 = kMove == Move::kAdamBf16;
  using Av = Averages<F, kWide, kMove>;

  // A pack of parameters and averages; v not with Move::kAdamMini.
  struct State {
    typename P::Raw w_enc, w_dec;
    typename Av::Raw m_enc, v_enc, m_dec, v_dec;
  };

  const AdamArgs<F, R>& a;
  Bits *g_dec, *g_enc, *share;  // [d] each
  const AdamRate<A>& rate;      // in shared memory, which takes no registers
  int tid;

  __device__ __forceinline__ static A at(const typename P::Raw& raw, int e) {
    return P::at(raw, e);
  }

  __device__ __forceinline__ A more_b_enc(int64_t f) const {
    return a.more_b_enc ? F::widen(a.more_b_enc[f]) : A(0);
  }

  // Starts to fetch what the threads will need when the sums are there.
  __device__ __forceinline__ void prefetch_rows(int64_t from) const {
    constexpr int kLine = 128 / static_cast<int>(sizeof(A));
    for (int c = tid * kLine; c < a.d; c += kThreads * kLine) {
      for (const Bits* p : {a.W_enc.p, a.W_dec.p}) prefetch(p + from + c);
      for (const Bits* of : {a.W_enc.m, a.W_dec.m}) prefetch(Av::place(of, from + c));
      if constexpr (!kMini) {
        for (const Bits* of : {a.W_enc.v, a.W_dec.v}) prefetch(Av::place(of, from + c));
      }
    }
  }

  // g_dec, g_enc and the sum of weights of one latent, from its list and its extra row (-1: none).
  __device__ __forceinline__ void sum_lists(int begin, int end, int extra, A* weight_sum) const {
    const int lane = tid & 31, warp = tid >> 5;
    for (int task = warp; task < 2 * a.chunks; task += kWarps) {
      const bool dec = task < a.chunks;
      const int chunk = dec ? task : task - a.chunks;
      const S strip(chunk, lane, a.row_packs);
      typename S::Sum sum;
      A weights;
      list_sum(dec ? a.dec_lists : a.enc_lists, begin, end, chunk, a.chunks, strip, sum,
               dec ? a.grad_rows : a.centered_rows, a.d, dec ? a.dec_segments : a.enc_segments,
               &weights);
      if (extra >= 0) {
        strip.template add<F>(sum, (dec ? a.extra_W_dec : a.extra_W_enc) + int64_t{extra} * a.d);
      }
      strip.template store<F>(sum, dec ? g_dec : g_enc);
      if (!dec && chunk == 0 && lane == 0) {
        *weight_sum = extra >= 0 ? weights + F::widen(a.extra_b_enc[extra]) : weights;
      }
    }
  }

  // Pack i of the rows that start at `from`.
  __device__ __forceinline__ State load(int64_t from, int i) const {
    State s{};
    if (i >= a.packs) return s;
    const int64_t c = from + i * E;
    s.w_enc = P::load_own(a.W_enc.p + c), s.w_dec = P::load_own(a.W_dec.p + c);
    if constexpr (kMove != Move::kNone) {
      s.m_enc = Av::load_own(a.W_enc.m, c), s.m_dec = Av::load_own(a.W_dec.m, c);
    }
    if constexpr (kMove != Move::kNone && !kMini) {
      s.v_enc = Av::load_own(a.W_enc.v, c), s.v_dec = Av::load_own(a.W_dec.v, c);
    }
    return s;
  }

  // How much of W_dec[f] is in g_dec: what has to be subtracted. `space` [2 kWarps].
  __device__ __forceinline__ A project(int64_t from, A* space) const {
    A dots[2] = {0, 0};
    for (int i = tid; i < a.packs; i += kThreads) {
      const auto w = P::load_own(a.W_dec.p + from + i * E), g = P::load_own(g_dec + i * E);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        dots[0] += at(g, e) * at(w, e);
        dots[1] += at(w, e) * at(w, e);
      }
    }
    block_sums<kThreads>(dots, space);
    return dots[1] > A(0) ? dots[0] / dots[1] : A(0);
  }

  // Adam-mini: averages the mean squares of both gradients of latent f in, and returns what their
  // averages have to be multiplied with, for W_enc and W_dec. `space` [2 kWarps].
  __device__ __forceinline__ void average_squares(int64_t f, bool any, A along, A scale, A* space,
                                                  A (&steps)[2]) const {
    const Bits* from[2] = {a.W_enc.v + f, a.W_dec.v + f};
    const A old[2] = {F::widen(*from[0]), F::widen(*from[1])};
    A squares[2] = {0, 0};
    for (int i = tid; any && i < a.packs; i += kThreads) {
      const auto w = P::load_own(a.W_dec.p + f * a.d + i * E);
      const auto enc = P::load_own(g_enc + i * E), dec = P::load_own(g_dec + i * E);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const A g = at(dec, e) - along * at(w, e);
        squares[0] += at(enc, e) * at(enc, e);
        squares[1] += g * g;
      }
    }
    block_sums<kThreads>(squares, space);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const A square = scale * scale * (squares[i] / static_cast<A>(max(a.d, 1)));
      const A v = a.adam.one_minus_beta2 * square + a.adam.beta2 * old[i];
      if (tid == 0) (i == 0 ? a.W_enc : a.W_dec).v[f] = F::narrow(v);
      const A root = Adam<A>::square_root(v) * rate.inverse_correction2 + a.adam.eps;
      steps[i] = rate.step_size / root;
    }
  }

  // An element of W_enc or W_dec; `step` is from average_squares.
  __device__ __forceinline__ void move(A g, A& p, A& m, A& v, A step) const {
    if constexpr (kMini) {
      m += a.adam.one_minus_beta1 * (g - m);
      p -= step * m;
    } else {
      a.adam.move(rate, g, p, m, v);
    }
  }

  // Moves both rows and adds to the share of b_dec; returns this thread's part of the new squared
  // norm of W_dec[f], or with Move::kNone of the gradients. `size` is that of the list, `next` the
  // thread's first pack, `keys` those of the rounding of both rows. Passing `any` instead costs up
  // to 24 registers (float64 on sm_120).
  __device__ __forceinline__ A move_rows(int64_t from, int size, int extra, A g_b, A along, A scale,
                                         const A (&steps)[2], const DitherKey (&keys)[2],
                                         State next) const {
    const bool any = size > 0 || extra >= 0;
    A norm = 0;
    for (int i = tid; i < a.packs; i += kThreads) {
      const int64_t c = from + i * E;
      typename P::Raw raw_enc{}, raw_dec{};
      if (any) {
        raw_enc = P::load_own(g_enc + i * E);
        raw_dec = P::load_own(g_dec + i * E);
      }
      const State own = next;
      next = load(from, i + kThreads);
      if (g_b != A(0)) {
        const auto old = P::load_own(share + i * E);
        A sum[E];
#pragma unroll
        for (int e = 0; e < E; ++e) sum[e] = at(old, e) - g_b * at(own.w_enc, e);
        P::store(share + i * E, sum);
      }
      A gradient[E];  // of W_dec
#pragma unroll
      for (int e = 0; e < E; ++e)
        gradient[e] = any ? at(raw_dec, e) - along * at(own.w_dec, e) : A(0);
      if constexpr (kMove == Move::kNone) {
#pragma unroll
        for (int e = 0; e < E; ++e) norm += at(raw_enc, e) * at(raw_enc, e);
#pragma unroll
        for (int e = 0; e < E; ++e) norm += gradient[e] * gradient[e];
      } else {
        A p[E], m[E], v[E];
#pragma unroll
        for (int e = 0; e < E; ++e) {
          p[e] = at(own.w_enc, e), m[e] = Av::at(own.m_enc, e), v[e] = Av::at(own.v_enc, e);
          move(any ? scale * at(raw_enc, e) : A(0), p[e], m[e], v[e], steps[0]);
        }
        P::store(a.W_enc.p + c, p);
        store_copy<F, kWide>(a.bf16_W_enc, c, p);
        Av::store(a.W_enc, c, m, v, keys[0], i * E);
#pragma unroll
        for (int e = 0; e < E; ++e) {
          p[e] = at(own.w_dec, e), m[e] = Av::at(own.m_dec, e), v[e] = Av::at(own.v_dec, e);
          move(any ? scale * gradient[e] : A(0), p[e], m[e], v[e], steps[1]);
          norm += p[e] * p[e];
        }
        P::store(a.unit_norm ? g_dec + i * E : a.W_dec.p + c, p);
        if (!a.unit_norm) store_copy<F, kWide>(a.bf16_W_dec, c, p);
        Av::store(a.W_dec, c, m, v, keys[1], i * E);
      }
    }
    return norm;
  }

  // Writes the moved row of W_dec, which lies in g_dec, with norm 1. `space` [kWarps].
  __device__ __forceinline__ void renormalize(int64_t from, A norm, A* space) const {
    A squared[1] = {norm};
    block_sums<kThreads>(squared, space);
    const A factor = squared[0] > A(0) ? A(1) / Adam<A>::square_root(squared[0]) : A(1);
    for (int i = tid; i < a.packs; i += kThreads) {
      const auto moved = P::load_own(g_dec + i * E);
      A p[E];
#pragma unroll
      for (int e = 0; e < E; ++e) p[e] = factor * at(moved, e);
      P::store(a.W_dec.p + from + i * E, p);
      store_copy<F, kWide>(a.bf16_W_dec, from + i * E, p);
    }
  }

  // Writes the share of a group.
  __device__ __forceinline__ void store_share(int64_t group) const {
    for (int i = tid; a.shares && i < a.packs; i += kThreads) {
      const auto sum = P::load_own(share + i * E);
      A x[E];
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] = at(sum, e);
      P::store(a.shares + group * a.d + i * E, x);
    }
  }
};

}  // namespace fastsae::cuda
