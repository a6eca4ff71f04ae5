// What a block of the update does where encoder and decoder are unlike: with entries, rows and
// widths of their own, or with gradients of whole matrices.
#pragma once

#include "cuda/adam_block.cuh"

namespace fastsae::cuda {

// A matrix, and what its gradient is a sum of.
template <class F, class R>
struct AdamSide {
  using Bits = typename F::Bits;
  Parameter<F> W;  // [d_sae, d]
  ListsView<R> lists;
  Segments<typename F::Acc> segments;
  const typename R::Bits* gathered;  // [n, d]
  const Bits* extra;                 // [extra rows, d], or null
  const Bits* more;                  // [d_sae, d], or null
  int d;
  int packs;              // of a row of parameters
  int row_packs, chunks;  // of a row that is gathered
  uint16_t* bf16_W;       // [d_sae, d]: gets the moved rows in bfloat16; or null
};

// F: the format of parameters; R: of the rows that are gathered.
template <class F, class R>
struct AdamBySideArgs {
  using Bits = typename F::Bits;
  using A = typename F::Acc;
  AdamSide<F, R> enc, dec;
  Parameter<F> b_enc;
  const int32_t* extra_rows;  // [d_sae]: row of the extra gradients, or -1; or null
  const Bits* extra_b_enc;
  const Bits* more_b_enc;  // [d_sae]: more of its gradient, or null
  int d_sae;
  Adam<A> adam;
  const AdamRate<A>* rate;
  const A* scale;  // of all gradients, or null: 1
  bool unit_norm;
  Bits* shares;     // [groups, enc.d], or null: b_dec gets none
  double* squares;  // [groups]: squared norms of gradients
  Bits* rows;       // [blocks, row_numbers()], or null: in shared memory

  // g_dec, g_enc and the share.
  __host__ __device__ int64_t row_numbers() const { return dec.d + 2 * int64_t{enc.d}; }
};

// Where the lists of a group of latents begin, and where the last one ends: in shared memory, which
// takes no registers while rows are gathered.
struct GroupLists {
  int enc[kGroup + 1], dec[kGroup + 1];
};

template <class F, class R, bool kWide, int kPacks, int kThreads, Move kMove>
struct AdamBySideBlock {
  using A = typename F::Acc;
  using Bits = typename F::Bits;
  using P = Pack<F, kWide>;
  using Side = AdamSide<F, R>;
  static constexpr int E = P::kSize, kBlockThreads = kThreads, kWarps = kThreads / 32;
  static constexpr bool kMini = kMove == Move::kAdamMini;
  static constexpr bool kBf16 = kMove == Move::kAdamBf16;
  using Av = Averages<F, kWide, kMove>;

  // A pack of a matrix and its averages; v not with Move::kAdamMini.
  struct State {
    typename P::Raw w;
    typename Av::Raw m, v;
  };

  const AdamBySideArgs<F, R>& a;
  Bits* rows;               // [row_numbers()]
  const AdamRate<A>& rate;  // in shared memory, which takes no registers
  int tid;

  __device__ __forceinline__ static A at(const typename P::Raw& raw, int e) {
    return P::at(raw, e);
  }

  __device__ __forceinline__ Bits* g_dec() const { return rows; }
  __device__ __forceinline__ Bits* g_enc() const { return rows + a.dec.d; }
  __device__ __forceinline__ Bits* share() const { return rows + a.dec.d + a.enc.d; }

  __device__ __forceinline__ A more_b_enc(int f) const {
    return a.more_b_enc ? F::widen(a.more_b_enc[f]) : A(0);
  }

  // Starts to fetch what the threads will need when the sums are there.
  __device__ __forceinline__ void prefetch_row(const Side& side, int f) const {
    constexpr int kLine = 128 / static_cast<int>(sizeof(A));
    for (int c = tid * kLine; c < side.d; c += kThreads * kLine) {
      prefetch(side.W.p + int64_t{f} * side.d + c);
      prefetch(Av::place(side.W.m, int64_t{f} * side.d + c));
      if constexpr (!kMini) prefetch(Av::place(side.W.v, int64_t{f} * side.d + c));
    }
  }

  // g_dec and g_enc of latent f, if there are any, and with g_enc the sum of weights: of the lists
  // of a member of the group, the extra row (-1: none) and the rows of whole gradients. lists(dec)
  // gives those of a side.
  template <class Lists>
  __device__ __forceinline__ void sum_lists(const GroupLists& group, int member, int f, int extra,
                                            bool any_enc, bool any_dec, A* weight_sum,
                                            Lists&& lists) const {
    using S = Strip<R, kWide, kPacks>;
    const int lane = tid & 31, warp = tid >> 5;
    for (int task = warp; task < a.dec.chunks + a.enc.chunks; task += kWarps) {
      const bool dec = task < a.dec.chunks;
      if (!(dec ? any_dec : any_enc)) continue;
      const int chunk = dec ? task : task - a.dec.chunks, d = dec ? a.dec.d : a.enc.d;
      const int* bounds = (dec ? group.dec : group.enc) + member;
      const S strip(chunk, lane, dec ? a.dec.row_packs : a.enc.row_packs);
      typename S::Sum sum;
      A weights;
      list_sum(lists(dec), bounds[0], bounds[1], chunk, dec ? a.dec.chunks : a.enc.chunks, strip,
               sum, dec ? a.dec.gathered : a.enc.gathered, d, dec ? a.dec.segments : a.enc.segments,
               &weights);
      const Bits* more = dec ? a.dec.more : a.enc.more;
      if (extra >= 0) {
        strip.template add<F>(sum, (dec ? a.dec.extra : a.enc.extra) + int64_t{extra} * d);
      }
      if (more) strip.template add<F>(sum, more + int64_t{f} * d);
      strip.template store<F>(sum, dec ? g_dec() : g_enc());
      if (!dec && chunk == 0 && lane == 0) {
        *weight_sum = extra >= 0 ? weights + F::widen(a.extra_b_enc[extra]) : weights;
      }
    }
  }

  // Pack i of row f.
  __device__ __forceinline__ State load(const Side& side, int f, int i) const {
    State s{};
    if (i >= side.packs) return s;
    const int64_t c = int64_t{f} * side.d + i * E;
    s.w = P::load_own(side.W.p + c);
    if constexpr (kMove != Move::kNone) s.m = Av::load_own(side.W.m, c);
    if constexpr (kMove != Move::kNone && !kMini) s.v = Av::load_own(side.W.v, c);
    return s;
  }

  // Pack i of row f of W_dec.
  __device__ __forceinline__ typename P::Raw load_weights(int f, int i) const {
    return P::load_own(a.dec.W.p + int64_t{f} * a.dec.d + i * E);
  }

  // How much of a row of W_dec is in g_dec: what has to be subtracted. row(i) reads pack i of it.
  // `space` [2 kWarps].
  template <class Row>
  __device__ __forceinline__ A project(A* space, Row&& row) const {
    A dots[2] = {0, 0};
    for (int i = tid; i < a.dec.packs; i += kThreads) {
      const typename P::Raw w = row(i), g = P::load_own(g_dec() + i * E);
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
  __device__ __forceinline__ void average_squares(int f, bool any_enc, bool any_dec, A along,
                                                  A scale, A* space, A (&steps)[2]) const {
    const A old[2] = {F::widen(a.enc.W.v[f]), F::widen(a.dec.W.v[f])};
    A squares[2] = {0, 0};
    for (int i = tid; any_enc && i < a.enc.packs; i += kThreads) {
      const auto enc = P::load_own(g_enc() + i * E);
#pragma unroll
      for (int e = 0; e < E; ++e) squares[0] += at(enc, e) * at(enc, e);
    }
    for (int i = tid; any_dec && i < a.dec.packs; i += kThreads) {
      const auto w = load_weights(f, i), dec = P::load_own(g_dec() + i * E);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const A g = at(dec, e) - along * at(w, e);
        squares[1] += g * g;
      }
    }
    block_sums<kThreads>(squares, space);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int d = i == 0 ? a.enc.d : a.dec.d;
      const A square = scale * scale * (squares[i] / static_cast<A>(max(d, 1)));
      const A v = a.adam.one_minus_beta2 * square + a.adam.beta2 * old[i];
      if (tid == 0) (i == 0 ? a.enc : a.dec).W.v[f] = F::narrow(v);
      const A root = Adam<A>::square_root(v) * rate.inverse_correction2 + a.adam.eps;
      steps[i] = rate.step_size / root;
    }
  }

  // Moves row f of a matrix, and of W_enc adds to the share of b_dec; returns this thread's part of
  // the squared norm of the moved row, or with Move::kNone of the gradient. `next`: the thread's
  // first pack, and load(i) reads pack i; `step` is from average_squares.
  template <bool kDec, class Load>
  __device__ __forceinline__ A move_row(int f, bool any, A g_b, A along, A scale, A step,
                                        State next, Load&& load) const {
    const Side& side = kDec ? a.dec : a.enc;
    Bits* sums = kDec ? g_dec() : g_enc();
    const bool shared = !kDec && a.shares && g_b != A(0);
    DitherKey key{};
    if constexpr (kBf16) key = dither_of_row(rate.dither, f, kDec ? 1 : 0);
    A norm = 0;
    for (int i = tid; i < side.packs; i += kThreads) {
      const int64_t c = int64_t{f} * side.d + i * E;
      typename P::Raw raw{};
      if (any) raw = P::load_own(sums + i * E);
      const State own = next;
      next = load(i + kThreads);
      if (shared) {
        const auto old = P::load_own(share() + i * E);
        A sum[E];
#pragma unroll
        for (int e = 0; e < E; ++e) sum[e] = at(old, e) - g_b * at(own.w, e);
        P::store(share() + i * E, sum);
      }
      A p[E], m[E], v[E];
#pragma unroll
      for (int e = 0; e < E; ++e) {
        A g = any ? at(raw, e) : A(0);
        if (kDec && any) g -= along * at(own.w, e);
        if constexpr (kMove == Move::kNone) {
          norm += g * g;
        } else {
          p[e] = at(own.w, e), m[e] = Av::at(own.m, e), v[e] = Av::at(own.v, e);
          if constexpr (kMini) {
            m[e] += a.adam.one_minus_beta1 * (scale * g - m[e]);
            p[e] -= step * m[e];
          } else {
            a.adam.move(rate, scale * g, p[e], m[e], v[e]);
          }
          norm += p[e] * p[e];
        }
      }
      if constexpr (kMove != Move::kNone) {
        P::store(kDec && a.unit_norm ? sums + i * E : side.W.p + c, p);
        if (!(kDec && a.unit_norm)) store_copy<F, kWide>(side.bf16_W, c, p);
        Av::store(side.W, c, m, v, key, i * E);
      }
    }
    return norm;
  }

  // Writes the moved row of W_dec, which lies in g_dec, with norm 1. `space` [kWarps].
  __device__ __forceinline__ void renormalize(int f, A norm, A* space) const {
    A squared[1] = {norm};
    block_sums<kThreads>(squared, space);
    const A factor = squared[0] > A(0) ? A(1) / Adam<A>::square_root(squared[0]) : A(1);
    for (int i = tid; i < a.dec.packs; i += kThreads) {
      const auto moved = P::load_own(g_dec() + i * E);
      A p[E];
#pragma unroll
      for (int e = 0; e < E; ++e) p[e] = factor * at(moved, e);
      P::store(a.dec.W.p + int64_t{f} * a.dec.d + i * E, p);
      store_copy<F, kWide>(a.dec.bf16_W, int64_t{f} * a.dec.d + i * E, p);
    }
  }

  // Moves the biases of `count` latents from f on; `gradients` are of their lists.
  __device__ __forceinline__ void move_biases(int f, int count, const A* gradients, A scale) const {
    if (tid >= count) return;
    f += tid;
    A p = F::widen(a.b_enc.p[f]), m = F::widen(a.b_enc.m[f]), v = F::widen(a.b_enc.v[f]);
    a.adam.move(rate, scale * (gradients[tid] + more_b_enc(f)), p, m, v);
    a.b_enc.p[f] = F::narrow(p);
    a.b_enc.m[f] = F::narrow(m);
    a.b_enc.v[f] = F::narrow(v);
  }

  __device__ __forceinline__ void clear_share() const {
    const A zeros[E] = {};
    for (int i = tid; a.shares && i < a.enc.packs; i += kThreads) P::store(share() + i * E, zeros);
  }

  // Writes the share of a group.
  __device__ __forceinline__ void store_share(int group) const {
    for (int i = tid; a.shares && i < a.enc.packs; i += kThreads) {
      const auto sum = P::load_own(share() + i * E);
      A x[E];
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] = at(sum, e);
      P::store(a.shares + int64_t{group} * a.enc.d + i * E, x);
    }
  }
};

// Packs of a strip, at most: what the registers of every architecture have room for.
template <class R>
constexpr int kMostPacks = std::is_same_v<R, BFloat16> ? 3 : 4;

// How the kernel is launched.
struct BySideLaunch {
  bool wide;
  int per_lane;  // packs of a strip: 2 or kMostPacks, and kMostPacks with 512 threads or not wide
  int threads;   // 128, or where wide 512
  int64_t blocks;
  int64_t shared;  // bytes of shared memory
  Move move;
};

// For Float32 and either rows, and Float64, whose rows are never wide.
template <class F, class R>
void launch_adam_by_side(const AdamBySideArgs<F, R>& args, const BySideLaunch& how,
                         cudaStream_t stream);

}  // namespace fastsae::cuda
