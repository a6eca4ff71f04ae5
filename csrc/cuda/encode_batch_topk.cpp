// The operator encode_batch_topk on CUDA: the `budget` largest positive pre-activations.
#include "cuda/encode_select.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_batch_topk(
    const Tensor& x, const Tensor& W_enc, std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
    int64_t budget, std::optional<Tensor> mask, bool bf16_product,
    std::optional<Tensor> threshold_guess) {
  constexpr const char* op = "encode_batch_topk";
  format_of(op, "x", x);
  const DeviceScope device(x);
  const EncoderArguments in = encoder_input(op, x, W_enc, b_enc, b_dec, mask, bf16_product);
  const int64_t capacity = selection_capacity(op, "budget", budget, x.size(0), in.d_sae);
  check_threshold_guess(op, threshold_guess);  // and no more: a sample serves better here
  if (threshold_guess) check_device(op, "threshold_guess", *threshold_guess, x);
  return ChunkedSelect(op, in, x, bf16_product, capacity, nullptr).run().entries_and_threshold();
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("encode_batch_topk", TORCH_BOX(&encode_batch_topk));
}

}  // namespace fastsae::cuda
