// out[n, d] = sum_j values[n, j] W[indices[n, j]] + bias.
//
// A warp owns a strip of columns of one token; warps of a block take neighboring strips, so that a
// row of W is read whole. The sum starts with the bias and runs in the order of the entries.
//
// Cost: one row of W per active entry. No shared memory, no atomics.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/sparse_decode.h"

namespace fastsae::cuda {

constexpr int kDecodeThreads = 128;

// A task is one strip of one token. F is the format of W, S that of bias and out.
template <class F, class S, bool kWide, int kPacks>
__global__ void __launch_bounds__(kDecodeThreads, kGatherBlocks<kPacks>)
    sparse_decode_kernel(SparseActsView<F> entries, const typename F::Bits* __restrict__ W,
                         const typename S::Bits* __restrict__ bias, int64_t n, int64_t d, int packs,
                         int chunks, typename S::Bits* __restrict__ out) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kDecodeThreads / 32);
  int64_t task = static_cast<int64_t>(blockIdx.x) * (kDecodeThreads / 32) + threadIdx.x / 32;
  for (; task < n * chunks; task += warps) {
    const int64_t token = task / chunks;
    const Strip<F, kWide, kPacks> strip(static_cast<int>(task % chunks), lane, packs);
    typename Strip<F, kWide, kPacks>::Sum sum;
    strip.template start<S>(sum, bias);
    gather_sum(strip, sum, entries.begin(token), entries.end(token), W, d,
               [&](int j) { return entries.entry(j); });
    strip.template store<S>(sum, out + token * d);
  }
}

}  // namespace fastsae::cuda
