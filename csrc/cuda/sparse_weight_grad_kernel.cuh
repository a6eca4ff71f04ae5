// weight[f] = sum over the list of latent f of values[slot] x[row], bias[f] = sum of values[slot].
// A warp owns a strip of columns of one latent, after segments_kernel has summed what long lists
// have beyond their first segment. Cost: entries x d read, mostly from L2 as x is small, and F x d
// written once.
#pragma once

#include "cuda/lists.cuh"
#include "cuda/sparse_weight_grad.h"

namespace fastsae::cuda {

// A task is one strip of one latent.
template <class F, bool kWide, int kPacks>
__global__ void __launch_bounds__(kListThreads, kGatherBlocks<kPacks>)
    weight_grad_kernel(ListsView<F> lists, const typename F::Bits* __restrict__ x, int64_t d,
                       int packs, int chunks, Segments<typename F::Acc> later,
                       typename F::Bits* __restrict__ weight, typename F::Bits* __restrict__ bias) {
  using S = Strip<F, kWide, kPacks>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kListThreads / 32);
  int64_t task = static_cast<int64_t>(blockIdx.x) * (kListThreads / 32) + threadIdx.x / 32;
  for (; task < int64_t{lists.p.d_sae} * chunks; task += warps) {
    const int64_t f = task / chunks;
    const int chunk = static_cast<int>(task % chunks);
    const S strip(chunk, lane, packs);
    typename S::Sum sum;
    typename F::Acc weights;
    list_sum(lists, lists.begin(f), lists.end(f), chunk, chunks, strip, sum, x, d, later, &weights);
    strip.store(sum, weight + f * d);
    if (chunk == 0 && lane == 0) bias[f] = F::narrow(weights);
  }
}

}  // namespace fastsae::cuda
