// The operator sparse_decode on CUDA: check, allocate, launch, register.
#include "cuda/sparse_decode.h"

#include "cuda/sparse_acts_args.h"

namespace fastsae::cuda {
namespace {

Tensor sparse_decode(const Tensor& values, const Tensor& indices, std::optional<Tensor> offsets,
                     const Tensor& W_dec, std::optional<Tensor> b_dec,
                     std::optional<Tensor> bf16_W_dec) {
  constexpr const char* op = "sparse_decode";
  check_matrix(op, "W_dec", W_dec);
  const Format format = format_of(op, "W_dec", W_dec);
  const int64_t d = W_dec.size(1);
  check_values_type(op, values, "W_dec", W_dec);
  check_decoder_bias(op, b_dec, W_dec);
  const DeviceScope device(W_dec);
  const Tensor W = as_contiguous(checked_decoder_rows(op, W_dec, bf16_W_dec));
  const SparseActsArgs e = checked_sparse_acts(op, values, indices, offsets, W.size(0),
                                               W_dec.scalar_type(), "W_dec", W_dec);
  std::optional<Tensor> bias;
  if (b_dec) bias = as_contiguous(*b_dec);
  Tensor out = new_empty(W, {e.params.n, d}, W_dec.scalar_type());
  const DecodeParams params{e.params, W.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                            static_cast<int32_t>(d), out.mutable_data_ptr()};
  check_launch(op,
               launch_sparse_decode(params, format_of(op, "W_dec", W), format, device.stream()));
  return out;
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
}

}  // namespace fastsae::cuda
