// Launches of the sparse_adam_step_ kernel for encoders and decoders that are unlike. Fewer shapes
// of it than of the kernel for one code: it is one step of many classes, each of them rarer.
#include "cuda/sparse_adam_step_by_side_kernel.cuh"

namespace fastsae::cuda {
namespace {

template <class F, class R, bool kWide, int kPacks, int kThreads, Move kMove>
void launch_move(const AdamBySideArgs<F, R>& args, const BySideLaunch& how, cudaStream_t stream) {
  const size_t shared = static_cast<size_t>(how.shared);
  allow_shared(&adam_by_side_kernel<F, R, kWide, kPacks, kThreads, kMove>, shared);
  FASTSAE_LAUNCH((adam_by_side_kernel<F, R, kWide, kPacks, kThreads, kMove>), grid_of(how.blocks),
                 kThreads, shared, stream, args);
}

template <class F, class R, bool kWide, int kPacks, int kThreads>
void launch(const AdamBySideArgs<F, R>& args, const BySideLaunch& how, cudaStream_t stream) {
  if (how.move == Move::kNone) {
    launch_move<F, R, kWide, kPacks, kThreads, Move::kNone>(args, how, stream);
  } else if (how.move == Move::kAdamMini) {
    launch_move<F, R, kWide, kPacks, kThreads, Move::kAdamMini>(args, how, stream);
  } else if (how.move == Move::kAdam) {
    launch_move<F, R, kWide, kPacks, kThreads, Move::kAdam>(args, how, stream);
  } else if constexpr (std::is_same_v<F, Float32>) {
    launch_move<F, R, kWide, kPacks, kThreads, Move::kAdamBf16>(args, how, stream);
  }
}

}  // namespace

template <class F, class R>
void launch_adam_by_side(const AdamBySideArgs<F, R>& args, const BySideLaunch& how,
                         cudaStream_t stream) {
  if (args.d_sae == 0) return;
  constexpr int kMost = kMostPacks<R>;
  if constexpr (std::is_same_v<F, R>) {
    if (!how.wide) return launch<F, R, false, kMost, 128>(args, how, stream);
  }
  if constexpr (std::is_same_v<F, Float32>) {
    if (how.threads == 512) return launch<F, R, true, kMost, 512>(args, how, stream);
    if (how.per_lane == 2) return launch<F, R, true, 2, 128>(args, how, stream);
    return launch<F, R, true, kMost, 128>(args, how, stream);
  }
}

template void launch_adam_by_side(const AdamBySideArgs<Float32, Float32>&, const BySideLaunch&,
                                  cudaStream_t);
template void launch_adam_by_side(const AdamBySideArgs<Float32, BFloat16>&, const BySideLaunch&,
                                  cudaStream_t);
template void launch_adam_by_side(const AdamBySideArgs<Float64, Float64>&, const BySideLaunch&,
                                  cudaStream_t);

}  // namespace fastsae::cuda
