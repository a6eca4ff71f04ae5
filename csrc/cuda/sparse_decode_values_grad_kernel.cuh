// out[n, j] = <grad[n], W[indices[n, j]]>, the gradient of sparse_decode in its values.
//
// A warp owns up to 32 entries of one token. It multiplies the token's row of grad with kDotRows
// rows of W side by side and adds up lanes at the end.
//
// Cost: one row of W per active entry. No shared memory, no atomics.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/sparse_decode_values_grad.h"

namespace fastsae::cuda {

constexpr int kValuesGradThreads = 128;
constexpr int kDotRows = 8;

// Sums of 8 numbers over lanes, in a fixed order: lanes 4r to 4r + 3 get the sum of number r.
template <class T>
__device__ __forceinline__ T warp_sum_8(T (&x)[8], int lane) {
#pragma unroll
  for (int half = 4; half > 0; half >>= 1) {  // every lane gives away half of its numbers
    const bool upper = lane & (half << 2);
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const T given = upper ? x[r] : x[r + half], kept = upper ? x[r + half] : x[r];
      x[r] = kept + __shfl_xor_sync(kFullWarp, given, half << 2);
    }
  }
  x[0] += __shfl_xor_sync(kFullWarp, x[0], 2);
  return x[0] + __shfl_xor_sync(kFullWarp, x[0], 1);
}

// A task is one batch of one token. `batches`: warps that share the entries of a token, `batch` <=
// 32 at a time.
template <class F, bool kWide>
__global__ void __launch_bounds__(kValuesGradThreads, 5)
    values_grad_kernel(SparseActsView<F> entries, const typename F::Bits* __restrict__ grad,
                       const typename F::Bits* __restrict__ W, int64_t n, int64_t d, int packs,
                       int batches, int batch, void* __restrict__ out) {
  using P = Pack<F, kWide>;
  using Acc = typename F::Acc;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kValuesGradThreads / 32);
  int64_t task = static_cast<int64_t>(blockIdx.x) * (kValuesGradThreads / 32) + threadIdx.x / 32;
  const auto write = [&](int j, Acc x) {
    if (entries.p.wide) static_cast<Acc*>(out)[j] = x;
    else static_cast<typename F::Bits*>(out)[j] = F::narrow(x);
  };
  for (; task < n * batches; task += warps) {
    const int64_t token = task / batches;
    const int begin = entries.begin(token), size = entries.end(token) - begin;
    for (int64_t first = task % batches * batch; first < size; first += int64_t{batches} * batch) {
      const int j = begin + static_cast<int>(first) + lane;
      const bool inside = lane < batch && first + lane < size;
      const Entry<Acc> own = inside ? entries.entry(j) : Entry<Acc>{0, Acc(0)};
      unsigned left = __ballot_sync(kFullWarp, own.weight != Acc(0));
      // The dot product of the lane's entry comes out of round place / kDotRows.
      const int place = own.weight != Acc(0) ? __popc(left & ((1u << lane) - 1u)) : -1;
      Acc product = 0;
      for (int round = 0; left; ++round) {
        const typename F::Bits* row[kDotRows];
        int from = 0;
#pragma unroll
        for (int r = 0; r < kDotRows; ++r) {
          if (left) from = __ffs(static_cast<int>(left)) - 1;  // past the last one: that again
          left &= left - 1;
          row[r] = W + __shfl_sync(kFullWarp, own.index, from) * d;
        }
        Acc dot[kDotRows] = {};
        for (int p = lane; p < packs; p += 32) {
          typename P::Raw held[kDotRows];
#pragma unroll
          for (int r = 0; r < kDotRows; ++r) held[r] = P::load(row[r] + p * P::kSize);
          const typename P::Raw left_side = P::load(grad + token * d + p * P::kSize);
#pragma unroll
          for (int r = 0; r < kDotRows; ++r) {
#pragma unroll
            for (int e = 0; e < P::kSize; ++e) {
              dot[r] += P::at(left_side, e) * P::at(held[r], e);
            }
          }
        }
        const Acc total = warp_sum_8(dot, lane);
        const Acc mine = __shfl_sync(kFullWarp, total, 4 * (place & 7));
        if (place >= 0 && place / kDotRows == round) product = mine;
      }
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
