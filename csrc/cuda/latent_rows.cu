// Launches of the kernels of latent_rows_kernel.cuh.
#include "cuda/latent_rows.h"

#include "cuda/latent_rows_kernel.cuh"

namespace fastsae::cuda {
namespace {

// With the number of float32 or float64.
template <class Call>
const char* with_sums(Format format, Call&& call) {
  if (format == Format::kFloat64) call(Float64{});
  else call(Float32{});
  return launch_error();
}

}  // namespace

const char* launch_scores(const ScoreParams& p, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (p.rows.n == 0) return nullptr;
  return with_sums(format, [&](auto f) {
    using F = decltype(f);
    if (p.effect) {
      FASTSAE_LAUNCH((scores_kernel<F, true>), grid_of(p.rows.n), kRowThreads, 0, on, p);
    } else {
      FASTSAE_LAUNCH((scores_kernel<F, false>), grid_of(p.rows.n), kRowThreads, 0, on, p);
    }
  });
}

const char* launch_pick(const PickParams& p, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t entries = p.rows.n * p.k;
  if (entries == 0) return nullptr;
  return with_sums(format, [&](auto f) {
    FASTSAE_LAUNCH((pick_kernel<decltype(f)>), grid_of((entries + kRowThreads - 1) / kRowThreads),
                   kRowThreads, 0, on, p);
  });
}

const char* launch_group_max(const GroupMaxParams& p, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  constexpr int kWarps = kRowThreads / 32;
  const int64_t groups = p.rows.n * p.k;
  if (groups == 0) return nullptr;
  return with_sums(format, [&](auto f) {
    FASTSAE_LAUNCH(group_max_kernel<decltype(f)>, grid_of((groups + kWarps - 1) / kWarps),
                   kRowThreads, 0, on, p);
  });
}

}  // namespace fastsae::cuda
