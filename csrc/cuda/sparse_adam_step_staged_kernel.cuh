// One training step, latent by latent, whose rows are on their way while the latent before is
// moved: what sparse_adam_step_by_side_kernel.cuh does, of float32 with rows that are wide.
//
// A block has room for a row of each matrix and of its averages. As soon as a thread has moved its
// packs of a row, it starts to copy the same packs of the next latent's over them. So these come
// while the gradients of the next latent are summed, and take no registers meanwhile. Nobody but
// that thread reads them, so waiting for them takes no barrier. The first 32 entries of the next
// latent's lists are read ahead too, found by two accesses in a row, and the rows that they name
// fetched into the second-level cache. There are 4 to 8 on average.
#pragma once

#include "cuda/adam_staged.cuh"
#include "cuda/async_copy.cuh"

namespace fastsae::cuda {

// A row of a matrix and of both averages in shared memory, and the packs of it that a thread owns.
template <class Block>
struct StagedRow {
  using P = typename Block::P;
  using Av = typename Block::Av;
  typename P::Raw* w;   // [packs]
  typename Av::Raw* m;  // [2 packs]: v after m

  // Starts to copy this thread's packs of row f.
  __device__ __forceinline__ void start(const typename Block::Side& side, int f, int tid) const {
    for (int i = tid; i < side.packs; i += Block::kBlockThreads) {
      const int64_t c = int64_t{f} * side.d + i * Block::E;
      start_copy<sizeof(*w)>(w + i, side.W.p + c);
      start_copy<sizeof(*m)>(m + i, Av::place(side.W.m, c));
      start_copy<sizeof(*m)>(m + side.packs + i, Av::place(side.W.v, c));
    }
  }
  __device__ __forceinline__ typename Block::State load(int packs, int i) const {
    if (i >= packs) return {};
    return {w[i], m[i], m[packs + i]};
  }
};

// A block takes a group of latents at a time, one latent after the other.
template <class R, int kPacks, int kThreads, Move kMove>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    adam_staged_kernel(AdamBySideArgs<Float32, R> a) {
  using Block = AdamBySideBlock<Float32, R, true, kPacks, kThreads, kMove>;
  using Row = StagedRow<Block>;
  constexpr int kWarps = kThreads / 32;
  FASTSAE_DYN_SMEM(uint32_t, rows);  // staged_shared()
  __shared__ GroupLists lists;
  __shared__ Entry<float> first[2][32];  // of the decoder's list and the encoder's
  __shared__ AdamRate<float> rate;
  __shared__ float weight_sum, group_bias[kGroup];
  __shared__ float space[2 * kWarps], norm_space[kWarps];
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5;
  const Block block{a, rows, rate, tid};
  auto* weights = reinterpret_cast<uint4*>(rows + a.row_numbers());
  auto* averages = reinterpret_cast<typename Block::Av::Raw*>(weights + a.dec.packs + a.enc.packs);
  const Row dec{weights, averages}, enc{weights + a.dec.packs, averages + 2 * a.dec.packs};
  const float scale = a.scale ? *a.scale : 1.0f;
  if (a.rate->inverse_correction2 == 0.0f) return;  // there is no step
  if (tid == 0) rate = *a.rate;                     // read after the first barrier below

  // What the first two warps hold of a member's lists; the rows that these name are on their way.
  const auto read_entry = [&](int member) {
    const typename Block::Side& side = warp == 0 ? a.dec : a.enc;
    const int* bounds = (warp == 0 ? lists.dec : lists.enc) + member;
    const int j = bounds[0] + lane;
    if (j >= bounds[1]) return Entry<float>{0, 0.0f};
    const Entry<float> entry = side.lists.entry(j);
    if (entry.weight != 0.0f) {
      prefetch_row(side.gathered + int64_t{entry.index} * side.d,
                   static_cast<unsigned>(side.d) * sizeof(typename R::Bits));
    }
    return entry;
  };
  const int groups = (a.d_sae - 1) / kGroup + 1;
  for (int group = static_cast<int>(blockIdx.x); group < groups;
       group += static_cast<int>(gridDim.x)) {
    const int count = min(kGroup, a.d_sae - group * kGroup), f0 = group * kGroup;
    dec.start(a.dec, f0, tid);
    close_copies();
    enc.start(a.enc, f0, tid);
    close_copies();
    if (tid <= count) {
      lists.enc[tid] = a.enc.lists.begin(f0 + tid);
      lists.dec[tid] = a.dec.lists.begin(f0 + tid);
    }
    block.clear_share();
    __syncthreads();  // the bounds of all lists are there
    if (warp < 2) first[warp][lane] = read_entry(0);
    __syncthreads();  // the first entries of the first lists are there
    for (int member = 0; member < count; ++member) {
      const int f = f0 + member;
      const bool last = member + 1 == count;
      const int extra = a.extra_rows ? a.extra_rows[f] : -1;
      const auto any = [&](const int* bounds, const uint32_t* more) {
        return bounds[member + 1] > bounds[member] || extra >= 0 || more;
      };
      const bool any_enc = any(lists.enc, a.enc.more), any_dec = any(lists.dec, a.dec.more);
      if (any_enc || any_dec) {
        block.sum_lists(lists, member, f, extra, any_enc, any_dec, &weight_sum, [&](bool of_dec) {
          return StagedLists<R>{of_dec ? a.dec.lists : a.enc.lists, first[of_dec ? 0 : 1],
                                (of_dec ? lists.dec : lists.enc)[member]};
        });
        __syncthreads();  // both sums are there, and the first entries are free
      }
      Entry<float> next{0, 0.0f};
      if (warp < 2 && !last) next = read_entry(member + 1);
      const float g_b = any_enc ? weight_sum : 0.0f;
      if (tid == 0) group_bias[member] = g_b;

      wait_for_copies<1>();
      const float along = any_dec ? block.project(space, [&](int i) { return dec.w[i]; }) : 0.0f;
      const auto load_dec = [&](int i) { return dec.load(a.dec.packs, i); };
      const float norm = block.template move_row<true>(f, any_dec, 0.0f, along, scale, 0.0f,
                                                       load_dec(tid), load_dec);
      if (!last) dec.start(a.dec, f + 1, tid);
      close_copies();

      wait_for_copies<1>();
      const auto load_enc = [&](int i) { return enc.load(a.enc.packs, i); };
      block.template move_row<false>(f, any_enc, g_b, 0.0f, scale, 0.0f, load_enc(tid), load_enc);
      if (!last) enc.start(a.enc, f + 1, tid);
      close_copies();

      if (a.unit_norm) block.renormalize(f, norm, norm_space);
      if (warp < 2) first[warp][lane] = next;
      __syncthreads();  // both sums are read before those of the next latent overwrite them
    }

    block.store_share(group);
    block.move_biases(f0, count, group_bias, scale);
    __syncthreads();  // the biases are read before the next group overwrites them
  }
}

}  // namespace fastsae::cuda
