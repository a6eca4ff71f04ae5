// out[n, d] = sum_j values[n, j] W[indices[n, j]] + bias, error = out - target, the sum of its
// squares, and products[n, j] = <error[n], W[indices[n, j]]>.
//
// A block owns a token. Its warps take strips of columns as in sparse_decode, then batches of
// entries as in sparse_decode_values_grad: rows of W that the first pass has brought into the
// caches are read again, and so is the error. Both passes add in the order of those kernels.
//
// Cost: one row of W per active entry from memory, and one from a cache. No atomics.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/sparse_decode_error.h"

namespace fastsae::cuda {

constexpr int kDecodeErrorThreads = 128;

// F is the format of W, S that of bias, target and out.

// Of one token: where its rows start.
template <class S>
struct ErrorRow {
  const typename S::Bits* target;
  typename S::Bits* out;
  typename S::Acc* error;
};

// error = out - target in the columns of a strip, both stored; returns the sum of its squares.
template <class F, class S, bool kWide, int kPacks>
__device__ __forceinline__ typename F::Acc subtract(const Strip<F, kWide, kPacks>& strip,
                                                    typename Strip<F, kWide, kPacks>::Sum& sum,
                                                    const ErrorRow<S>& row) {
  using Wide = typename FormatOf<typename F::Acc>::type;
  typename Strip<F, kWide, kPacks>::Sum wanted;
  strip.template start<S>(wanted, row.target);
  strip.template store<S>(sum, row.out);
  typename F::Acc squared = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int e = 0; e < Pack<F, kWide>::kSize; ++e) {
      sum[i][e] = S::widen(S::narrow(sum[i][e])) - wanted[i][e];
      if (strip.has(i)) squared += sum[i][e] * sum[i][e];
    }
  }
  strip.template store<Wide>(sum, reinterpret_cast<typename Wide::Bits*>(row.error));
  return squared;
}

// A pack of an error, rounded to S, as long as a pack of a row of W.
template <class F, bool kWide>
struct RoundedPack {
  typename F::Acc x[Pack<F, kWide>::kSize];
  __device__ __forceinline__ typename F::Acc at(int e) const { return x[e]; }
};
template <class F, class S, bool kWide>
__device__ __forceinline__ RoundedPack<F, kWide> load_rounded(const typename F::Acc* error, int p) {
  using Wide = typename FormatOf<typename F::Acc>::type;
  using In = Pack<Wide, kWide>;
  RoundedPack<F, kWide> pack;
  const auto* from = reinterpret_cast<const typename Wide::Bits*>(error);
#pragma unroll
  for (int to = 0; to < Pack<F, kWide>::kSize; to += In::kSize) {
    const typename In::Raw raw = In::load_own(from + p * Pack<F, kWide>::kSize + to);
#pragma unroll
    for (int e = 0; e < In::kSize; ++e) pack.x[to + e] = S::widen(S::narrow(In::at(raw, e)));
  }
  return pack;
}

// `packs` of a row, in `chunks` strips.
template <class F, class S, bool kWide, int kPacks>
__global__ void __launch_bounds__(kDecodeErrorThreads, kGatherBlocks<kPacks>)
    sparse_decode_error_kernel(SparseActsView<F> entries, const typename F::Bits* __restrict__ W,
                               const typename S::Bits* __restrict__ bias,
                               const typename S::Bits* __restrict__ target, int64_t n, int64_t d,
                               int packs, int chunks, typename S::Bits* __restrict__ out,
                               typename F::Acc* error, typename F::Acc* __restrict__ squared,
                               typename F::Acc* __restrict__ products) {
  using Acc = typename F::Acc;
  constexpr int kWarps = kDecodeErrorThreads / 32;
  __shared__ Acc space[kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread / 32;
  for (int64_t token = blockIdx.x; token < n; token += gridDim.x) {
    const int begin = entries.begin(token), end = entries.end(token);
    const ErrorRow<S> row{target + token * d, out + token * d, error + token * d};
    Acc part = 0;
    for (int chunk = warp; chunk < chunks; chunk += kWarps) {
      const Strip<F, kWide, kPacks> strip(chunk, lane, packs);
      typename Strip<F, kWide, kPacks>::Sum sum;
      strip.template start<S>(sum, bias);
      gather_sum(strip, sum, begin, end, W, d, [&](int j) { return entries.entry(j); });
      part += subtract(strip, sum, row);
    }
    const Acc total = block_sum<kDecodeErrorThreads>(part, space);  // and the error is there
    if (thread == 0) squared[token] = total;
    for (int first = begin + warp * kDotRows; first < end; first += kWarps * kDotRows) {
      const int j = first + lane;
      const bool own = lane < kDotRows && j < end;
      const Acc product =
          gather_dot<F, kWide>(own ? entries.entry(j) : Entry<Acc>{0, Acc(0)}, W, d, packs,
                               [&](int p) { return load_rounded<F, S, kWide>(row.error, p); });
      if (own) products[j] = product;
    }
    __syncthreads();  // done with the sum before the next token
  }
  // Padding after the entries of the last token.
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kDecodeErrorThreads;
  int64_t j = n > 0 ? entries.end(n - 1) : 0;
  j += static_cast<int64_t>(blockIdx.x) * kDecodeErrorThreads + thread;
  for (; j < entries.p.capacity; j += threads) products[j] = Acc(0);
}

}  // namespace fastsae::cuda
