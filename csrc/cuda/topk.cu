// Launches of the topk kernels. No torch header: nvcc takes seconds, and the emulation builds it.
#include "cuda/topk.h"

#include <algorithm>

#include "cuda/topk_kernel.cuh"

namespace fastsae::cuda {
namespace {

template <class F>
const char* launch(const TopkParams& p, cudaStream_t stream) {
  using Bits = typename F::Bits;
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(p.n, 1 << 20));
  Bits* values = static_cast<Bits*>(p.values);
  FASTSAE_LAUNCH(topk_kernel<F>, grid, kThreads, 0, stream, static_cast<const Bits*>(p.x), p.n, p.m,
                 p.k, values, p.indices);
  if (p.sorted) {
    FASTSAE_LAUNCH(sort_kernel<F>, grid, kThreads, 0, stream, p.n, p.k, next_power_of_two(p.k),
                   p.sort_space, values, p.indices);
  }
  return launch_error();
}

}  // namespace

int32_t next_power_of_two(int32_t k) {
  int32_t size = 1;
  while (size < k) size <<= 1;
  return size;
}

const char* launch_topk(const TopkParams& params, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return with_format(format, [&](auto f) { return launch<decltype(f)>(params, on); });
}

}  // namespace fastsae::cuda
