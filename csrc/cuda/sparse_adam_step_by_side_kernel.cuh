// One training step, latent by latent, where encoder and decoder are unlike: what
// sparse_adam_step_kernel.cuh does, of two lists for each latent. It is a kernel of its own so that
// the one for one code, which most classes have, keeps its registers.
//
// A side without entries and rows for a latent has gradient 0 there and is not summed.
#pragma once

#include "cuda/adam_by_side.cuh"

namespace fastsae::cuda {

// A block takes a group of latents at a time, one latent after the other.
template <class F, class R, bool kWide, int kPacks, int kThreads, Move kMove>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    adam_by_side_kernel(AdamBySideArgs<F, R> a) {
  using Block = AdamBySideBlock<F, R, kWide, kPacks, kThreads, kMove>;
  constexpr bool kUpdate = kMove != Move::kNone;
  using A = typename F::Acc;
  using Bits = typename F::Bits;
  constexpr int kWarps = kThreads / 32;
  FASTSAE_DYN_SMEM(Bits, dynamic);  // [row_numbers()]
  __shared__ GroupLists lists;
  __shared__ AdamRate<A> rate;
  __shared__ A weight_sum, group_bias[kGroup];
  __shared__ A space[2 * kWarps], norm_space[kWarps], mini_space[2 * kWarps];
  __shared__ double square_space[kWarps];
  Bits* rows = a.rows ? a.rows + blockIdx.x * a.row_numbers() : dynamic;
  const int tid = static_cast<int>(threadIdx.x);
  const Block block{a, rows, rate, tid};
  const A scale = a.scale ? *a.scale : A(1);
  if constexpr (kUpdate) {
    if (a.rate->inverse_correction2 == A(0)) return;  // there is no step
    if (tid == 0) rate = *a.rate;                     // read after the first barrier below
  }

  const int groups = (a.d_sae - 1) / kGroup + 1;
  for (int group = static_cast<int>(blockIdx.x); group < groups;
       group += static_cast<int>(gridDim.x)) {
    const int count = min(kGroup, a.d_sae - group * kGroup);
    if (tid <= count) {
      lists.enc[tid] = a.enc.lists.begin(group * kGroup + tid);
      lists.dec[tid] = a.dec.lists.begin(group * kGroup + tid);
    }
    block.clear_share();
    double squares = 0;
    __syncthreads();  // the bounds of all lists are there
    for (int member = 0; member < count; ++member) {
      const int f = group * kGroup + member;
      const int extra = a.extra_rows ? a.extra_rows[f] : -1;
      const auto any = [&](const int* bounds, const Bits* more) {
        return bounds[member + 1] > bounds[member] || extra >= 0 || more;
      };
      const bool any_enc = any(lists.enc, a.enc.more), any_dec = any(lists.dec, a.dec.more);
      if constexpr (kUpdate) {
        block.prefetch_row(a.enc, f);
        block.prefetch_row(a.dec, f);
      }
      if (any_enc || any_dec) {
        block.sum_lists(lists, member, f, extra, any_enc, any_dec, &weight_sum,
                        [&](bool dec) -> const auto& { return dec ? a.dec.lists : a.enc.lists; });
        __syncthreads();  // both gradients are there
      }
      // The first packs are loaded before they are needed: loads do not wait for stores.
      const auto load_enc = [&](int i) { return block.load(a.enc, f, i); };
      const auto load_dec = [&](int i) { return block.load(a.dec, f, i); };
      const typename Block::State first_enc = load_enc(tid), first_dec = load_dec(tid);
      const A g_b = any_enc ? weight_sum : A(0);
      if (tid == 0) group_bias[member] = g_b;
      const A along =
          any_dec ? block.project(space, [&](int i) { return block.load_weights(f, i); }) : A(0);
      A steps[2] = {0, 0};
      if constexpr (Block::kMini) {
        block.average_squares(f, any_enc, any_dec, along, scale, mini_space, steps);
      }
      const A norm_enc = block.template move_row<false>(f, any_enc, g_b, A(0), scale, steps[0],
                                                        first_enc, load_enc);
      const A norm_dec = block.template move_row<true>(f, any_dec, A(0), along, scale, steps[1],
                                                       first_dec, load_dec);
      if constexpr (!kUpdate) {
        squares += static_cast<double>(norm_enc) + static_cast<double>(norm_dec);
        const double b = static_cast<double>(g_b + block.more_b_enc(f));
        if (tid == 0) squares += b * b;
      } else if (a.unit_norm) {
        block.renormalize(f, norm_dec, norm_space);
      }
      __syncthreads();  // both gradients are read before those of the next latent overwrite them
    }

    block.store_share(group);
    if constexpr (kUpdate) {
      block.move_biases(group * kGroup, count, group_bias, scale);
      __syncthreads();  // the biases are read before the next group overwrites them
    } else {
      const double total = block_sum<kThreads>(squares, square_space);
      if (tid == 0) a.squares[group] = total;
      __syncthreads();  // the squares are read before the next group overwrites them
    }
  }
}

}  // namespace fastsae::cuda
