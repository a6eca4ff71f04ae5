// The operator sparse_decode_values_grad on CUDA: check, allocate, launch, register.
#include "cuda/sparse_decode_values_grad.h"

#include "cuda/sparse_acts_args.h"

namespace fastsae::cuda {
namespace {

Tensor sparse_decode_values_grad(const Tensor& grad_in, const Tensor& values, const Tensor& indices,
                                 std::optional<Tensor> offsets, const Tensor& W_dec,
                                 std::optional<Tensor> bf16_W_dec) {
  constexpr const char* op = "sparse_decode_values_grad";
  check_matrix(op, "W_dec", W_dec);
  const Format format = format_of(op, "W_dec", W_dec);
  const int64_t d = W_dec.size(1);
  check_values_type(op, values, "W_dec", W_dec);
  check_device(op, "grad", grad_in, W_dec, "W_dec");
  const DeviceScope device(W_dec);
  const Tensor W = as_contiguous(checked_decoder_rows(op, W_dec, bf16_W_dec));
  const Tensor grad = as_contiguous(grad_in);
  const SparseActsArgs e = checked_sparse_acts(op, values, indices, offsets, W.size(0),
                                               W_dec.scalar_type(), "W_dec", W_dec);
  FASTSAE_CHECK(grad.dim() == 2 && grad.size(0) == e.params.n && grad.size(1) == d, op,
                ": expected grad to be [", e.params.n, ", ", d, "], got ", shape_of(grad));
  FASTSAE_CHECK(grad.scalar_type() == W_dec.scalar_type(), op,
                ": expected grad to have the dtype of W_dec");
  Tensor out = torch::stable::empty_like(e.values);
  const ValuesGradParams params{e.params, grad.const_data_ptr(), W.const_data_ptr(),
                                static_cast<int32_t>(d), out.mutable_data_ptr()};
  check_launch(op, launch_sparse_decode_values_grad(params, format_of(op, "W_dec", W), format,
                                                    device.stream()));
  return out;
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("sparse_decode_values_grad", TORCH_BOX(&sparse_decode_values_grad));
}

}  // namespace fastsae::cuda
