// Launch of the column bounds of feature_topk. No torch header: nvcc takes seconds, and the
// emulation builds it.
#include "cuda/feature_topk.h"

#include "cuda/feature_topk_kernel.cuh"

namespace fastsae::cuda {

const char* launch_column_bound(const ColumnBoundParams& p, Format format, void* stream) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    const ColumnBoundArgs<F> a{static_cast<const typename F::Bits*>(p.x), p.n,      p.columns, p.m,
                               static_cast<typename F::Acc*>(p.theta),    p.tie_row};
    FASTSAE_LAUNCH(column_bound_kernel<F>, grid_of((int64_t{p.columns} + 31) / 32), kColumnThreads,
                   0, static_cast<cudaStream_t>(stream), a);
    return launch_error();
  });
}

}  // namespace fastsae::cuda
