// The operator topk on CUDA: check, allocate, launch on the current stream, register.
#include "cuda/topk.h"

#include "check.h"
#include "cuda/stream.h"
#include "torch.h"

namespace fastsae::cuda {
namespace {

Format format_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Format::kFloat32;
    case ScalarType::Double:
      return Format::kFloat64;
    case ScalarType::BFloat16:
      return Format::kBFloat16;
    case ScalarType::Half:
      return Format::kFloat16;
    default:
      FASTSAE_CHECK(false, "topk: expected x to be float32, float64, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> topk(const Tensor& x_in, int64_t k, bool sorted) {
  check_matrix("topk", "x", x_in);
  const int64_t n = x_in.size(0), m = x_in.size(1);
  check_k("topk", k, m);
  const Format format = format_of(x_in);
  const DeviceScope device(x_in);
  const Tensor x = as_contiguous(x_in);
  Tensor values = new_empty(x, {n, k}, x.scalar_type());
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  if (n == 0) return {values, indices};
  const int64_t space = sorted ? 2 * int64_t{next_power_of_two(static_cast<int32_t>(k))} : 0;
  Tensor sort_space = new_empty(x, {n, space}, ScalarType::Long);
  const TopkParams params{x.const_data_ptr(),
                          n,
                          static_cast<int32_t>(m),
                          static_cast<int32_t>(k),
                          sorted,
                          values.mutable_data_ptr(),
                          static_cast<int32_t*>(indices.mutable_data_ptr()),
                          static_cast<uint64_t*>(sort_space.mutable_data_ptr())};
  const char* error = launch_topk(params, format, device.stream());
  FASTSAE_CHECK(error == nullptr, "topk: ", error);
  return {values, indices};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("topk", TORCH_BOX(&topk));
}

}  // namespace fastsae::cuda
