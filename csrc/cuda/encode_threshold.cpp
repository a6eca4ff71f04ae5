// The operator encode_threshold on CUDA: the pre-activations above the threshold.
#include "cuda/encode_select.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> encode_threshold(const Tensor& x, const Tensor& W_enc,
                                                    std::optional<Tensor> b_enc,
                                                    std::optional<Tensor> b_dec,
                                                    const Tensor& threshold_in, int64_t capacity_in,
                                                    bool bf16_product) {
  constexpr const char* op = "encode_threshold";
  format_of(op, "x", x);
  const DeviceScope device(x);
  const EncoderArguments in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt, bf16_product);
  const Tensor threshold = as_contiguous(threshold_in);
  check_threshold(op, threshold, x, in.d_sae);
  check_device(op, "threshold", threshold, x);
  const int64_t capacity = selection_capacity(op, "capacity", capacity_in, x.size(0), in.d_sae);
  return ChunkedSelect(op, in, x, bf16_product, capacity, &threshold).run().entries();
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("encode_threshold", TORCH_BOX(&encode_threshold));
}

}  // namespace fastsae::cuda
