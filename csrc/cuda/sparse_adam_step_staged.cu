// Launches of the sparse_adam_step_ kernel that copies rows ahead of time.
#include "cuda/sparse_adam_step_staged_kernel.cuh"

namespace fastsae::cuda {
namespace {

template <class R, int kPacks, int kThreads, Move kMove>
void launch_move(const AdamBySideArgs<Float32, R>& args, const StagedLaunch& how,
                 cudaStream_t stream) {
  const size_t shared = static_cast<size_t>(how.shared);
  allow_shared(&adam_staged_kernel<R, kPacks, kThreads, kMove>, shared);
  FASTSAE_LAUNCH((adam_staged_kernel<R, kPacks, kThreads, kMove>), grid_of(how.groups), kThreads,
                 shared, stream, args);
}

template <class R, int kPacks, int kThreads>
void launch(const AdamBySideArgs<Float32, R>& args, const StagedLaunch& how, cudaStream_t stream) {
  if (how.bf16_averages) {
    launch_move<R, kPacks, kThreads, Move::kAdamBf16>(args, how, stream);
  } else {
    launch_move<R, kPacks, kThreads, Move::kAdam>(args, how, stream);
  }
}

}  // namespace

template <class R>
void launch_adam_staged(const AdamBySideArgs<Float32, R>& args, const StagedLaunch& how,
                        cudaStream_t stream) {
  if (args.d_sae == 0) return;
  constexpr int kMost = kMostPacks<R>;
  if (how.threads == 512) return launch<R, 2, 512>(args, how, stream);
  if (how.threads == 256) {
    if (how.per_lane == 2) return launch<R, 2, 256>(args, how, stream);
    return launch<R, kMost, 256>(args, how, stream);
  }
  if (how.per_lane == 2) return launch<R, 2, 128>(args, how, stream);
  return launch<R, kMost, 128>(args, how, stream);
}

template void launch_adam_staged(const AdamBySideArgs<Float32, Float32>&, const StagedLaunch&,
                                 cudaStream_t);
template void launch_adam_staged(const AdamBySideArgs<Float32, BFloat16>&, const StagedLaunch&,
                                 cudaStream_t);

}  // namespace fastsae::cuda
