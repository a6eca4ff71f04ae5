// Launches of the sparse_decode kernels, and which of them for which shape.
#include "cuda/sparse_decode.h"

#include <algorithm>

#include "cuda/sparse_decode_kernel.cuh"

namespace fastsae::cuda {
namespace {

constexpr int kWarps = kDecodeThreads / 32;

template <class F, class S, bool kWide>
void launch_decode(const DecodeParams& p, cudaStream_t stream) {
  using Bits = typename S::Bits;
  const SparseActsParams& e = p.entries;
  const auto launch = [&](const Split& split, auto packs) {
    FASTSAE_LAUNCH((sparse_decode_kernel<F, S, kWide, decltype(packs)::value>),
                   grid_of((e.n * split.chunks + kWarps - 1) / kWarps), kDecodeThreads, 0, stream,
                   SparseActsView<F>{e}, static_cast<const typename F::Bits*>(p.W),
                   static_cast<const Bits*>(p.bias), e.n, p.d, split.packs, split.chunks,
                   static_cast<Bits*>(p.out));
  };
  if constexpr (kWide) {
    const Split split = split_row(p.d / F::kVector, e.n);
    with_packs(split.per_lane, [&](auto packs) { launch(split, packs); });
  } else {
    launch(split_elements(p.d), Constant<4>{});
  }
}

}  // namespace

const char* launch_sparse_decode(const DecodeParams& params, Format rows, Format others,
                                 void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (params.entries.n == 0 || params.d == 0) return nullptr;
  with_decoder_formats(rows, others, [&](auto f, auto s) {
    using F = decltype(f);
    using S = decltype(s);
    const int64_t d = params.d;
    if (rows_aligned<F>(params.W, d) && rows_aligned<S>(params.out, d) &&
        rows_aligned<S>(params.bias, d)) {
      launch_decode<F, S, true>(params, on);
    } else {
      launch_decode<F, S, false>(params, on);
    }
  });
  return launch_error();
}

}  // namespace fastsae::cuda
