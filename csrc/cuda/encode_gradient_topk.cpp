// encode_gradient_topk on CUDA: a chunk of rows of both products at a time, on unrounded sums. The
// scores take the place of the effects.
#include "cuda/encode_by_score.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor> encode_gradient_topk(const Tensor& x, const Tensor& W_enc,
                                                std::optional<Tensor> b_enc,
                                                std::optional<Tensor> b_dec, const Tensor& grad,
                                                const Tensor& W_dec, int64_t k, double beta,
                                                bool normalize, bool bf16_product) {
  constexpr const char* op = "encode_gradient_topk";
  const Format format =
      format_of(op, "x", x) == Format::kFloat64 ? Format::kFloat64 : Format::kFloat32;
  const DeviceScope device(x);
  check_device(op, "grad", grad, x);
  check_device(op, "W_dec", W_dec, x);
  const EncoderArguments in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt, bf16_product);
  check_k(op, k, in.d_sae);
  check_effects(op, x, in.d_sae, grad, W_dec, beta);
  const EncoderArguments effects =
      encoder_input(op, grad, W_dec, std::nullopt, std::nullopt, std::nullopt, bf16_product);
  Tensor buffer = new_empty(x, {chunks_of(in).rows, in.d_sae}, accumulator_type(x));
  return encode_by_score(
      op, in, x, k, true, device.stream(), [&](const void* pre, int64_t first, int64_t rows) {
        Tensor scores = buffer;
        scores = torch::stable::narrow(scores, 0, 0, rows);
        multiply(effects, first, rows, 0, in.d_sae, scores);
        void* data = scores.mutable_data_ptr();
        const ScoreParams params{latent_rows(in, pre, rows), data, beta, normalize, data};
        check_launch(op, launch_scores(params, format, device.stream()));
        return scores;
      });
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("encode_gradient_topk", TORCH_BOX(&encode_gradient_topk));
}

}  // namespace fastsae::cuda
