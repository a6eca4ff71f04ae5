// Launches of the sparse_decode_values_grad kernel.
#include "cuda/sparse_decode_values_grad.h"

#include <algorithm>

#include "cuda/sparse_decode_values_grad_kernel.cuh"

namespace fastsae::cuda {
namespace {

constexpr int kWarps = kValuesGradThreads / 32;

template <class F, class S, bool kWide>
void launch_grad(const ValuesGradParams& p, cudaStream_t stream) {
  const SparseActsParams& e = p.entries;
  // Entries of an average row, in batches of 32, or fewer where more warps are needed.
  const int64_t row = e.offsets ? e.capacity / std::max<int64_t>(e.n, 1) : e.k;
  int batch = 32;
  while (batch > kDotRows && e.n * (row / batch) < 8 * multiprocessors()) batch /= 2;
  const int batches = static_cast<int>(std::max<int64_t>(1, (row + batch - 1) / batch));
  const int64_t tasks = std::max<int64_t>(e.n * batches, 1);
  FASTSAE_LAUNCH((values_grad_kernel<F, S, kWide>), grid_of((tasks + kWarps - 1) / kWarps),
                 kValuesGradThreads, 0, stream, SparseActsView<F>{e},
                 static_cast<const typename S::Bits*>(p.grad),
                 static_cast<const typename F::Bits*>(p.W), e.n, p.d, p.d / Pack<F, kWide>::kSize,
                 batches, batch, p.out);
}

}  // namespace

const char* launch_sparse_decode_values_grad(const ValuesGradParams& params, Format rows,
                                             Format others, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (params.entries.capacity == 0) return nullptr;
  with_decoder_formats(rows, others, [&](auto f, auto s) {
    using F = decltype(f);
    using S = decltype(s);
    if (rows_aligned<F>(params.W, params.d) && rows_aligned<S>(params.grad, params.d)) {
      launch_grad<F, S, true>(params, on);
    } else {
      launch_grad<F, S, false>(params, on);
    }
  });
  return launch_error();
}

}  // namespace fastsae::cuda
