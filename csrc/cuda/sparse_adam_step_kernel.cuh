// One training step, latent by latent. A block owns a latent at a time: its warps sum
//
//   g_dec = sum over the list of value error[row],  g_enc = sum of g (x - b_dec)[row],
//   g_b = sum of g
//
// into shared memory, a strip of columns each. Then its threads own columns: g_dec loses what
// points along W_dec[f], Adam moves all three, and W_dec[f] gets norm 1. No gradient of a matrix is
// stored.
//
// -g_b W_enc[f] is a share of the gradient of b_dec. Blocks add those up over kGroup latents in
// order, and column_sums_kernel adds the shares and the rows of `error`. With clipping, a first
// launch of the same kernel finds the norm of the whole gradient instead of moving anything.
//
// Every sum has an order that depends on nothing but the shapes. Cost: parameters and averages are
// read and written once, 24 bytes for a float32 parameter, and two rows per entry gathered. Where n
// rows do not fit the cache these come from memory, and bfloat16 halves them.
#pragma once

#include "cuda/lists.cuh"
#include "cuda/sparse_adam_step.h"

namespace fastsae::cuda {

constexpr int kGroup = 16;  // latents whose shares of the gradient of b_dec are added up together
constexpr int kColumnRows = 64;  // rows that a block of column_sums_kernel adds up
constexpr int kColumnThreads = 128;

// Constants of a step, in the type of parameters.
template <class A>
struct Adam {
  A one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_correction2, eps;

  explicit Adam(const AdamConstants& c)
      : one_minus_beta1(static_cast<A>(c.one_minus_beta1)),
        beta2(static_cast<A>(c.beta2)),
        one_minus_beta2(static_cast<A>(c.one_minus_beta2)),
        step_size(static_cast<A>(c.step_size)),
        inverse_correction2(static_cast<A>(c.inverse_correction2)),
        eps(static_cast<A>(c.eps)) {}

  __device__ __forceinline__ void move(A g, A& p, A& m, A& v) const {
    m += one_minus_beta1 * (g - m);
    v = one_minus_beta2 * (g * g) + beta2 * v;
    if constexpr (sizeof(A) == sizeof(float)) {
      p -= step_size * close_quotient(m, close_root(v) * inverse_correction2 + eps);
    } else {
      p -= step_size * (m / (sqrt(v) * inverse_correction2 + eps));
    }
  }
  __device__ __forceinline__ static A square_root(A x) {
    if constexpr (sizeof(A) == sizeof(float)) return sqrtf(x);
    else return sqrt(x);
  }
};

template <class F>
struct Moving {
  typename F::Bits *p, *m, *v;
  explicit Moving(const MovingParams& x)
      : p(static_cast<typename F::Bits*>(x.p)),
        m(static_cast<typename F::Bits*>(x.m)),
        v(static_cast<typename F::Bits*>(x.v)) {}
};

// F: the format of parameters; R: of the rows of `error` and `centred`.
template <class F, class R>
struct AdamArgs {
  using Bits = typename F::Bits;
  using A = typename F::Acc;
  Moving<F> W_enc, W_dec, b_enc;
  ListsView<R> of_error, of_centred;  // one and the same lists, with values and with grad_values
  Segments<A> later_of_error, later_of_centred;
  const typename R::Bits *error, *centred;
  const int32_t* added;  // [d_sae]: row of the added gradients, or -1; or null
  const Bits *added_W_enc, *added_W_dec, *added_b_enc;
  int d_sae, d;
  int packs;              // of a row of parameters
  int row_packs, chunks;  // of a row that is gathered
  Adam<A> adam;
  const A* scale;  // of all gradients, or null: 1
  bool unit_norm;
  Bits* shares;     // [groups, d], or null
  double* squares;  // [groups]: squared norms of gradients
  Bits* held;       // [blocks, 3 d], or null: in shared memory
};

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

// kUpdate: Adam moves the parameters; else the squared norms of the gradients are found.
template <class F, class R, bool kWide, int kPacks, int kThreads, bool kUpdate>
__global__ void __launch_bounds__(kThreads, 512 / kThreads) adam_kernel(AdamArgs<F, R> a) {
  using A = typename F::Acc;
  using Bits = typename F::Bits;
  using P = Pack<F, kWide>;
  using S = Strip<R, kWide, kPacks>;
  constexpr int E = P::kSize, kWarps = kThreads / 32;
  FASTSAE_DYN_SMEM(Bits, dynamic);  // [3 d]
  __shared__ A weight_sum, group_bias[kGroup];
  __shared__ A space[2 * kWarps], norm_space[kWarps];
  __shared__ double square_space[kWarps];
  Bits* g_dec = a.held ? a.held + int64_t{blockIdx.x} * 3 * a.d : dynamic;
  Bits* g_enc = g_dec + a.d;
  Bits* share = g_enc + a.d;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5;
  const A zeros[E] = {};
  const A scale = a.scale ? *a.scale : A(1);
  const auto at = [](const typename P::Raw& raw, int e) { return P::at(raw, e); };

  for (int64_t group = blockIdx.x; group * kGroup < a.d_sae; group += gridDim.x) {
    const int count = min(kGroup, static_cast<int>(a.d_sae - group * kGroup));
    for (int i = tid; i < a.packs; i += kThreads) P::store(share + i * E, zeros);
    double squares = 0;
    // A lane has the begin of its member's list: that of one more than there are is the last end.
    const int bound = lane <= count ? a.of_error.begin(group * kGroup + lane) : 0;
    for (int member = 0; member < count; ++member) {
      const int64_t f = group * kGroup + member;
      const int begin = __shfl_sync(kFullWarp, bound, member);
      const int end = __shfl_sync(kFullWarp, bound, member + 1);
      const int more = a.added ? a.added[f] : -1;
      const bool any = end > begin || more >= 0;
      const int64_t from = f * a.d;
      if constexpr (kUpdate) {
        // What the threads will need when the sums are there.
        constexpr int kLine = 128 / static_cast<int>(sizeof(A));
        for (int c = tid * kLine; c < a.d; c += kThreads * kLine) {
          for (const Bits* p : {a.W_enc.p, a.W_enc.m, a.W_enc.v, a.W_dec.p, a.W_dec.m, a.W_dec.v}) {
            prefetch(p + from + c);
          }
        }
      }
      if (any) {
        for (int task = warp; task < 2 * a.chunks; task += kWarps) {
          const bool dec = task < a.chunks;
          const int chunk = dec ? task : task - a.chunks;
          const S strip(chunk, lane, a.row_packs);
          typename S::Sum sum;
          A weights;
          list_sum(dec ? a.of_error : a.of_centred, begin, end, chunk, a.chunks, strip, sum,
                   dec ? a.error : a.centred, a.d, dec ? a.later_of_error : a.later_of_centred,
                   &weights);
          if (more >= 0) {
            strip.template add<F>(sum, (dec ? a.added_W_dec : a.added_W_enc) + int64_t{more} * a.d);
          }
          strip.template store<F>(sum, dec ? g_dec : g_enc);
          if (!dec && chunk == 0 && lane == 0) {
            weight_sum = more >= 0 ? weights + F::widen(a.added_b_enc[more]) : weights;
          }
        }
        __syncthreads();  // the gradients are there
      }
      // Parameters and averages, on their way before they are needed: loads do not wait for stores.
      struct Own {
        typename P::Raw w_enc, w_dec, m_enc, v_enc, m_dec, v_dec;
      };
      const auto load = [&](int i) {
        Own own{};
        if (i >= a.packs) return own;
        const int64_t c = from + i * E;
        own.w_enc = P::load_own(a.W_enc.p + c), own.w_dec = P::load_own(a.W_dec.p + c);
        if constexpr (kUpdate) {
          own.m_enc = P::load_own(a.W_enc.m + c), own.v_enc = P::load_own(a.W_enc.v + c);
          own.m_dec = P::load_own(a.W_dec.m + c), own.v_dec = P::load_own(a.W_dec.v + c);
        }
        return own;
      };
      Own next = load(tid);
      const A g_b = any ? weight_sum : A(0);
      if (tid == 0) group_bias[member] = g_b;

      // g_dec -= along W_dec[f]
      A along = 0;
      if (any) {
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
        if (dots[1] > A(0)) along = dots[0] / dots[1];
      }

      A norm = 0;
      for (int i = tid; i < a.packs; i += kThreads) {
        const int64_t c = from + i * E;
        typename P::Raw raw_enc{}, raw_dec{};
        if (any) {
          raw_enc = P::load_own(g_enc + i * E);
          raw_dec = P::load_own(g_dec + i * E);
        }
        const Own own = next;
        next = load(i + kThreads);
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
        if constexpr (!kUpdate) {
#pragma unroll
          for (int e = 0; e < E; ++e) norm += at(raw_enc, e) * at(raw_enc, e);
#pragma unroll
          for (int e = 0; e < E; ++e) norm += gradient[e] * gradient[e];
        } else {
          A p[E], m[E], v[E];
#pragma unroll
          for (int e = 0; e < E; ++e) {
            p[e] = at(own.w_enc, e), m[e] = at(own.m_enc, e), v[e] = at(own.v_enc, e);
            a.adam.move(any ? scale * at(raw_enc, e) : A(0), p[e], m[e], v[e]);
          }
          P::store(a.W_enc.p + c, p);
          P::store(a.W_enc.m + c, m);
          P::store(a.W_enc.v + c, v);
#pragma unroll
          for (int e = 0; e < E; ++e) {
            p[e] = at(own.w_dec, e), m[e] = at(own.m_dec, e), v[e] = at(own.v_dec, e);
            a.adam.move(any ? scale * gradient[e] : A(0), p[e], m[e], v[e]);
            norm += p[e] * p[e];
          }
          P::store(a.unit_norm ? g_dec + i * E : a.W_dec.p + c, p);
          P::store(a.W_dec.m + c, m);
          P::store(a.W_dec.v + c, v);
        }
      }
      if constexpr (!kUpdate) {
        squares += static_cast<double>(norm);
        if (tid == 0) squares += static_cast<double>(g_b) * static_cast<double>(g_b);
      } else if (a.unit_norm) {
        A squared[1] = {norm};
        block_sums<kThreads>(squared, norm_space);
        const A factor = squared[0] > A(0) ? A(1) / Adam<A>::square_root(squared[0]) : A(1);
        for (int i = tid; i < a.packs; i += kThreads) {
          const auto moved = P::load_own(g_dec + i * E);
          A p[E];
#pragma unroll
          for (int e = 0; e < E; ++e) p[e] = factor * at(moved, e);
          P::store(a.W_dec.p + from + i * E, p);
        }
      }
      __syncthreads();  // the gradients are read before those of the next latent overwrite them
    }

    for (int i = tid; a.shares && i < a.packs; i += kThreads) {
      const auto sum = P::load_own(share + i * E);
      A x[E];
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] = at(sum, e);
      P::store(a.shares + group * a.d + i * E, x);
    }
    if constexpr (kUpdate) {
      if (tid < count) {
        const int64_t f = group * kGroup + tid;
        A p = F::widen(a.b_enc.p[f]), m = F::widen(a.b_enc.m[f]), v = F::widen(a.b_enc.v[f]);
        a.adam.move(scale * group_bias[tid], p, m, v);
        a.b_enc.p[f] = F::narrow(p);
        a.b_enc.m[f] = F::narrow(m);
        a.b_enc.v[f] = F::narrow(v);
      }
      __syncthreads();  // the biases are read before the next group overwrites them
    } else {
      const double total = block_sum<kThreads>(squares, square_space);
      if (tid == 0) a.squares[group] = total;
      __syncthreads();  // the squares are read before the next group overwrites them
    }
  }
}

// rows[f] = j where added[j] is f: the last one, should a latent come twice.
__global__ void __launch_bounds__(kColumnThreads)
    added_rows_kernel(const int32_t* __restrict__ added, int count, int d_sae,
                      int32_t* __restrict__ rows) {
  int j = static_cast<int>(blockIdx.x) * kColumnThreads + static_cast<int>(threadIdx.x);
  for (; j < count; j += static_cast<int>(gridDim.x) * kColumnThreads) {
    const int f = added[j];
    if (f >= 0 && f < d_sae) atomicMax(&rows[f], j);
  }
}

// out[part] = sum of kColumnRows rows of x [rows, d], a thread per column.
template <class A>
__global__ void __launch_bounds__(kColumnThreads)
    column_sums_kernel(const A* __restrict__ x, int64_t rows, int d, A* __restrict__ out) {
  const int strips = (d + kColumnThreads - 1) / kColumnThreads;
  const int64_t parts = (rows + kColumnRows - 1) / kColumnRows;
  for (int64_t task = blockIdx.x; task < parts * strips; task += gridDim.x) {
    const int64_t part = task / strips, first = part * kColumnRows;
    const int c = static_cast<int>(task % strips) * kColumnThreads + static_cast<int>(threadIdx.x);
    if (c >= d) continue;
    const int count = static_cast<int>(min(int64_t{kColumnRows}, rows - first));
    A sum = 0;
#pragma unroll 8
    for (int r = 0; r < count; ++r) sum += x[(first + r) * d + c];
    out[part * d + c] = sum;
  }
}

// out = sum of the rows of x [rows, d], 32 columns a block.
template <class A>
__global__ void __launch_bounds__(1024)
    last_column_sums_kernel(const A* __restrict__ x, int64_t rows, int d, A* __restrict__ out) {
  __shared__ A sums[32][33];
  const int lane = static_cast<int>(threadIdx.x) & 31, strand = static_cast<int>(threadIdx.x) >> 5;
  for (int first = static_cast<int>(blockIdx.x) * 32; first < d;
       first += static_cast<int>(gridDim.x) * 32) {
    const int c = first + lane;
    A sum = 0;
    for (int64_t r = strand; c < d && r < rows; r += 32) sum += x[r * d + c];
    sums[strand][lane] = sum;
    __syncthreads();  // all strands are there
    if (strand == 0 && c < d) {
      sum = 0;
      for (int s = 0; s < 32; ++s) sum += sums[s][lane];
      out[c] = sum;
    }
    __syncthreads();  // read before the next columns overwrite them
  }
}

// What all gradients have to be multiplied with so that their norm is at most max_norm. One block.
template <class A>
__global__ void __launch_bounds__(1024)
    clip_kernel(const double* __restrict__ squares, int64_t groups, const A* __restrict__ g_b_dec,
                int d, double max_norm, A* __restrict__ scale) {
  __shared__ double space[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < groups; i += 1024) sum += squares[i];
  for (int c = static_cast<int>(threadIdx.x); c < d; c += 1024) {
    sum += static_cast<double>(g_b_dec[c]) * static_cast<double>(g_b_dec[c]);
  }
  const double total = block_sum<1024>(sum, space);
  const double factor = max_norm / (sqrt(total) + 1e-6);
  if (threadIdx.x == 0) *scale = static_cast<A>(factor < 1.0 ? factor : 1.0);
}

template <class F>
__global__ void __launch_bounds__(kColumnThreads)
    adam_vector_kernel(Moving<F> x, const typename F::Acc* __restrict__ g, int d,
                       const typename F::Acc* __restrict__ scale, Adam<typename F::Acc> adam) {
  using A = typename F::Acc;
  const A factor = scale ? *scale : A(1);
  int c = static_cast<int>(blockIdx.x) * kColumnThreads + static_cast<int>(threadIdx.x);
  for (; c < d; c += static_cast<int>(gridDim.x) * kColumnThreads) {
    A p = F::widen(x.p[c]), m = F::widen(x.m[c]), v = F::widen(x.v[c]);
    adam.move(factor * g[c], p, m, v);
    x.p[c] = F::narrow(p);
    x.m[c] = F::narrow(m);
    x.v[c] = F::narrow(v);
  }
}

}  // namespace fastsae::cuda
