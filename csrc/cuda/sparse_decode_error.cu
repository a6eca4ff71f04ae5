// Launches of the sparse_decode_error kernels, and which of them for which shape.
#include "cuda/sparse_decode_error.h"

#include <algorithm>

#include "cuda/sparse_decode_error_kernel.cuh"

namespace fastsae::cuda {
namespace {

constexpr int kWarps = kDecodeErrorThreads / 32;

// As few packs per lane, 1 to 4, as give every strip a warp of its own. It depends on the width
// alone, and so does the order of a row's squares.
Split split_over_warps(int packs) {
  const int per_lane = std::clamp((packs + 32 * kWarps - 1) / (32 * kWarps), 1, 4);
  return {packs, per_lane, (packs + 32 * per_lane - 1) / (32 * per_lane)};
}

template <class F, class S, bool kWide>
void launch_error(const DecodeErrorParams& p, cudaStream_t stream) {
  using Bits = typename S::Bits;
  using Acc = typename F::Acc;
  const SparseActsParams& e = p.entries;
  const auto launch = [&](const Split& split, auto packs) {
    FASTSAE_LAUNCH((sparse_decode_error_kernel<F, S, kWide, decltype(packs)::value>),
                   grid_of(std::max<int64_t>(e.n, 1)), kDecodeErrorThreads, 0, stream,
                   SparseActsView<F>{e}, static_cast<const typename F::Bits*>(p.W),
                   static_cast<const Bits*>(p.bias), static_cast<const Bits*>(p.target), e.n, p.d,
                   split.packs, split.chunks, static_cast<Bits*>(p.out), static_cast<Acc*>(p.error),
                   static_cast<Acc*>(p.squared), static_cast<Acc*>(p.products));
  };
  if constexpr (kWide) {
    const Split split = split_over_warps(p.d / F::kVector);
    with_packs(split.per_lane, [&](auto packs) { launch(split, packs); });
  } else {
    launch(split_elements(p.d), Constant<4>{});
  }
}

}  // namespace

const char* launch_sparse_decode_error(const DecodeErrorParams& params, Format rows, Format others,
                                       void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (params.entries.n == 0 && params.entries.capacity == 0) return nullptr;
  with_decoder_formats(rows, others, [&](auto f, auto s) {
    using F = decltype(f);
    using S = decltype(s);
    const int64_t d = params.d;
    if (rows_aligned<F>(params.W, d) && rows_aligned<S>(params.bias, d) &&
        rows_aligned<S>(params.target, d) && rows_aligned<S>(params.out, d) &&
        rows_aligned<S>(params.error, d)) {
      launch_error<F, S, true>(params, on);
    } else {
      launch_error<F, S, false>(params, on);
    }
  });
  return launch_error();
}

}  // namespace fastsae::cuda
