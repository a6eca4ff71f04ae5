// Launches of the sparse_weight_grad kernels, and which of them for which shape.
#include "cuda/sparse_weight_grad.h"

#include "cuda/sparse_weight_grad_kernel.cuh"

namespace fastsae::cuda {
namespace {

template <class F>
bool wide(const WeightGradParams& p) {
  return rows_aligned<F>(p.x, p.d) && rows_aligned<F>(p.weight, p.d);
}

template <class F>
Split split_of(const WeightGradParams& p) {
  if (wide<F>(p)) return split_row(p.d / F::kVector, p.lists.d_sae);
  return split_elements(p.d);
}

template <class F>
Segments<typename F::Acc> take_segments(const WeightGradParams& p, const Split& split,
                                        Scratch& scratch) {
  const int64_t count = p.lists.later_segments();
  return Segments<typename F::Acc>::take(scratch, count, split, wide<F>(p) ? F::kVector : 1);
}

template <class F, bool kWide>
void launch(const WeightGradParams& p, cudaStream_t stream) {
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  const Split split = split_of<F>(p);
  Scratch scratch(p.scratch);
  const Segments<Acc> later = take_segments<F>(p, split, scratch);
  const auto launch_with = [&](auto packs) {
    constexpr int kPacks = decltype(packs)::value;
    launch_segments<F, kWide, kPacks>(p.lists, p.x, p.d, split, later, stream);
    const int64_t warps = int64_t{p.lists.d_sae} * split.chunks;
    FASTSAE_LAUNCH((weight_grad_kernel<F, kWide, kPacks>),
                   grid_of((warps + kListThreads / 32 - 1) / (kListThreads / 32)), kListThreads, 0,
                   stream, ListsView<F>{p.lists}, static_cast<const Bits*>(p.x), int64_t{p.d},
                   split.packs, split.chunks, later, static_cast<Bits*>(p.weight),
                   static_cast<Bits*>(p.bias));
  };
  if constexpr (kWide) with_packs(split.per_lane, launch_with);
  else launch_with(Constant<4>{});
}

}  // namespace

int64_t sparse_weight_grad_scratch(const WeightGradParams& params, Format format) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    Scratch scratch(nullptr);
    take_segments<F>(params, split_of<F>(params), scratch);
    return scratch.size();
  });
}

const char* launch_sparse_weight_grad(const WeightGradParams& params, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (params.lists.d_sae == 0) return nullptr;
  with_format(format, [&](auto f) {
    using F = decltype(f);
    if (wide<F>(params)) launch<F, true>(params, on);
    else launch<F, false>(params, on);
  });
  return launch_error();
}

}  // namespace fastsae::cuda
