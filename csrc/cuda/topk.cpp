// The operator topk on CUDA: check, allocate, launch on the current stream, register.
#include "cuda/topk.h"

#include "check.h"
#include "cuda/stream.h"
#include "torch.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor> topk(const Tensor& x_in, int64_t k, bool sorted) {
  check_matrix("topk", "x", x_in);
  const int64_t n = x_in.size(0), m = x_in.size(1);
  check_k("topk", k, m);
  const Format format = format_of("topk", "x", x_in);
  const DeviceScope device(x_in);
  const Tensor x = as_contiguous(x_in);
  Tensor values = new_empty(x, {n, k}, x.scalar_type());
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  if (n == 0) return {values, indices};
  TopkParams params{x.const_data_ptr(),
                    nullptr,
                    nullptr,
                    n,
                    static_cast<int32_t>(m),
                    static_cast<int32_t>(k),
                    sorted,
                    false,
                    values.mutable_data_ptr(),
                    mutable_data_of<int32_t>(indices)};
  Tensor space = scratch(x, topk_scratch(params, format));
  params.scratch = space.mutable_data_ptr();
  check_launch("topk", launch_topk(params, format, device.stream()));
  return {values, indices};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("topk", TORCH_BOX(&topk));
}

}  // namespace fastsae::cuda
