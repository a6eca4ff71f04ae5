// One training step, latent by latent. A block owns a latent at a time: its warps sum
//
//   g_dec = sum over the list of value grad_output[row],  g_enc = sum of g (x - b_dec)[row],
//   g_b = sum of g
//
// into shared memory, a strip of columns each. Then its threads own columns: g_dec loses what
// points along W_dec[f], Adam moves all three, and W_dec[f] gets norm 1. No gradient of a matrix is
// stored.
//
// -g_b W_enc[f] is a share of the gradient of b_dec. Blocks add those up over kGroup latents in
// order, and column_sums_kernel adds the shares and the rows of grad_output. With clipping, a first
// launch of the same kernel finds the norm of the whole gradient instead of moving anything.
//
// Every sum has an order that depends on nothing but the shapes. Cost: parameters and averages are
// read and written once, 24 bytes for a float32 parameter (16 with one average of squares for each
// row, Adam-mini), and two rows per entry gathered. Where n
// rows do not fit the cache these come from memory, and bfloat16 halves them.
#pragma once

#include "adam_rate.h"
#include "cuda/adam_block.cuh"
#include "cuda/column_sums.cuh"

namespace fastsae::cuda {

// A block takes a group of latents at a time, one latent after the other.
template <class F, class R, bool kWide, int kPacks, int kThreads, Move kMove>
__global__ void __launch_bounds__(kThreads, 512 / kThreads) adam_kernel(AdamArgs<F, R> a) {
  using Block = AdamBlock<F, R, kWide, kPacks, kThreads, kMove>;
  constexpr bool kUpdate = kMove != Move::kNone;
  using A = typename F::Acc;
  using Bits = typename F::Bits;
  using P = Pack<F, kWide>;
  constexpr int E = P::kSize, kWarps = kThreads / 32;
  FASTSAE_DYN_SMEM(Bits, dynamic);  // [3 d]
  __shared__ AdamRate<A> rate;
  __shared__ A weight_sum, group_bias[kGroup];
  __shared__ A space[2 * kWarps], norm_space[kWarps], mini_space[2 * kWarps];
  __shared__ double square_space[kWarps];
  Bits* rows = a.rows ? a.rows + int64_t{blockIdx.x} * 3 * a.d : dynamic;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31;
  // Not rows + 2 * a.d, a second offset: it spills on sm_80.
  const Block block{a, rows, rows + a.d, rows + a.d + a.d, rate, tid};
  const A zeros[E] = {};
  const A scale = a.scale ? *a.scale : A(1);
  if constexpr (kUpdate) {
    if (a.rate->inverse_correction2 == A(0)) return;  // there is no step
    if (tid == 0) rate = *a.rate;
    __syncthreads();  // the rate is there
  }

  for (int64_t group = blockIdx.x; group * kGroup < a.d_sae; group += gridDim.x) {
    const int count = min(kGroup, static_cast<int>(a.d_sae - group * kGroup));
    for (int i = tid; i < a.packs; i += kThreads) P::store(block.share + i * E, zeros);
    double squares = 0;
    // A lane has the begin of its member's list; the lane after the last member has the last end.
    const int bound = lane <= count ? a.dec_lists.begin(group * kGroup + lane) : 0;
    for (int member = 0; member < count; ++member) {
      const int64_t f = group * kGroup + member, from = f * a.d;
      const int begin = __shfl_sync(kFullWarp, bound, member);
      const int end = __shfl_sync(kFullWarp, bound, member + 1);
      const int extra = a.extra_rows ? a.extra_rows[f] : -1;
      const bool any = end > begin || extra >= 0;
      if constexpr (kUpdate) block.prefetch_rows(from);
      if (any) {
        block.sum_lists(begin, end, extra, &weight_sum);
        __syncthreads();  // the gradients are there
      }
      // Parameters and averages are loaded before they are needed: loads do not wait for stores.
      const typename Block::State first = block.load(from, tid);
      const A g_b = any ? weight_sum : A(0);
      if (tid == 0) group_bias[member] = g_b;
      const A along = any ? block.project(from, space) : A(0);
      A steps[2] = {0, 0};
      if constexpr (Block::kMini) block.average_squares(f, any, along, scale, mini_space, steps);
      DitherKey keys[2] = {};
      if constexpr (Block::kBf16) {
        for (int i = 0; i < 2; ++i) keys[i] = dither_of_row(rate.dither, f, i);
      }
      const A norm =
          block.move_rows(from, end - begin, extra, g_b, along, scale, steps, keys, first);
      if constexpr (!kUpdate) {
        squares += static_cast<double>(norm);
        const double b = static_cast<double>(g_b + block.more_b_enc(f));
        if (tid == 0) squares += b * b;
      } else if (a.unit_norm) {
        block.renormalize(from, norm, norm_space);
      }
      __syncthreads();  // the gradients are read before those of the next latent overwrite them
    }

    block.store_share(group);
    if constexpr (kUpdate) {
      if (tid < count) {
        const int64_t f = group * kGroup + tid;
        A p = F::widen(a.b_enc.p[f]), m = F::widen(a.b_enc.m[f]), v = F::widen(a.b_enc.v[f]);
        a.adam.move(rate, scale * (group_bias[tid] + block.more_b_enc(f)), p, m, v);
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

// The rate of this step, from numbers of the host or of the device. Called with one warp.
template <class A>
__global__ void adam_rate_kernel(double lr, double beta1, double beta2, int64_t step,
                                 const double* __restrict__ lr_at,
                                 const int64_t* __restrict__ step_at, int64_t seed,
                                 AdamRate<A>* rate) {
  if (threadIdx.x > 0) return;
  const AdamRate<double> exact =
      adam_rate(lr_at ? *lr_at : lr, beta1, beta2, step_at ? *step_at : step, seed);
  *rate = {static_cast<A>(exact.step_size), static_cast<A>(exact.inverse_correction2),
           exact.dither};
}

// rows[f] = j where latents[j] is f: the last one, should a latent come twice.
__global__ void __launch_bounds__(kColumnThreads)
    extra_rows_kernel(const int32_t* __restrict__ latents, int count, int d_sae,
                      int32_t* __restrict__ rows) {
  int j = static_cast<int>(blockIdx.x) * kColumnThreads + static_cast<int>(threadIdx.x);
  for (; j < count; j += static_cast<int>(gridDim.x) * kColumnThreads) {
    const int f = latents[j];
    if (f >= 0 && f < d_sae) atomicMax(&rows[f], j);
  }
}

// Moves a vector, which is b_dec.
template <class F>
__global__ void __launch_bounds__(kColumnThreads)
    adam_vector_kernel(Parameter<F> x, const typename F::Acc* __restrict__ g, int d,
                       const typename F::Acc* __restrict__ scale, Adam<typename F::Acc> adam,
                       const AdamRate<typename F::Acc>* __restrict__ rates) {
  using A = typename F::Acc;
  const AdamRate<A> rate = *rates;
  if (rate.inverse_correction2 == A(0)) return;  // there is no step
  const A factor = scale ? *scale : A(1);
  int c = static_cast<int>(blockIdx.x) * kColumnThreads + static_cast<int>(threadIdx.x);
  for (; c < d; c += static_cast<int>(gridDim.x) * kColumnThreads) {
    A p = F::widen(x.p[c]), m = F::widen(x.m[c]), v = F::widen(x.v[c]);
    adam.move(rate, factor * g[c], p, m, v);
    x.p[c] = F::narrow(p);
    x.m[c] = F::narrow(m);
    x.v[c] = F::narrow(v);
  }
}

}  // namespace fastsae::cuda
