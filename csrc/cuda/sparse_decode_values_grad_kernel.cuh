// out[n, j] = <grad[n], W[indices[n, j]]>, the gradient of sparse_decode in its values.
//
// A warp owns up to 32 entries of one token.
//
// Cost: one row of W per active entry. No shared memory, no atomics.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/sparse_decode_values_grad.h"

namespace fastsae::cuda {

constexpr int kValuesGradThreads = 128;

// A task is one batch of one token. `batches`: warps that share the entries of a token, `batch` <=
// 32 at a time. F is the format of W, S that of grad and out.
template <class F, class S, bool kWide>
__global__ void __launch_bounds__(kValuesGradThreads, 5)
    values_grad_kernel(SparseActsView<F> entries, const typename S::Bits* __restrict__ grad,
                       const typename F::Bits* __restrict__ W, int64_t n, int64_t d, int packs,
                       int batches, int batch, void* __restrict__ out) {
  using Held = HeldPack<F, S, kWide>;
  using Acc = typename F::Acc;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kValuesGradThreads / 32);
  int64_t task = static_cast<int64_t>(blockIdx.x) * (kValuesGradThreads / 32) + threadIdx.x / 32;
  const auto write = [&](int j, Acc x) {
    if (entries.p.wide) static_cast<Acc*>(out)[j] = x;
    else static_cast<typename S::Bits*>(out)[j] = S::narrow(x);
  };
  for (; task < n * batches; task += warps) {
    const int64_t token = task / batches;
    const int begin = entries.begin(token), size = entries.end(token) - begin;
    for (int64_t first = task % batches * batch; first < size; first += int64_t{batches} * batch) {
      const int j = begin + static_cast<int>(first) + lane;
      const bool inside = lane < batch && first + lane < size;
      const Entry<Acc> own = inside ? entries.entry(j) : Entry<Acc>{0, Acc(0)};
      const Acc product = gather_dot<F, kWide>(
          own, W, d, packs, [&](int p) { return Held(grad + token * d + p * Held::kSize); });
      if (inside) write(j, product);
    }
  }
  // Padding after the entries of the last token.
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kValuesGradThreads;
  int64_t j = n > 0 ? entries.end(n - 1) : 0;
  j += static_cast<int64_t>(blockIdx.x) * kValuesGradThreads + threadIdx.x;
  for (; j < entries.p.capacity; j += threads) write(static_cast<int>(j), Acc(0));
}

}  // namespace fastsae::cuda
