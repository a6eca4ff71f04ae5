// What sparse_adam_step.cu and the launches of the staged kernel agree on.
#pragma once

#include "cuda/adam_by_side.cuh"

namespace fastsae::cuda {

// How the kernel is launched: of float32 alone, with rows that are wide.
struct StagedLaunch {
  int threads;   // 128, 256 or 512
  int per_lane;  // packs of a strip: 2, or kMostPacks<R> with fewer than 512 threads
  int64_t groups;
  int64_t shared;  // bytes of shared memory
  bool bf16_averages;
};

// Bytes of dynamic shared memory: both gradients and the share, then a row of each matrix with its
// averages.
inline int64_t staged_shared(int64_t d_in, int64_t d_out, bool bf16_averages) {
  constexpr int64_t kNumber = sizeof(float);
  return kNumber * (d_out + 2 * d_in) + (d_out + d_in) * (kNumber + (bf16_averages ? 4 : 8));
}

template <class R>
void launch_adam_staged(const AdamBySideArgs<Float32, R>& args, const StagedLaunch& how,
                        cudaStream_t stream);

}  // namespace fastsae::cuda
