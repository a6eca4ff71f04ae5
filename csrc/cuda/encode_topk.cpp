// encode_topk on CUDA: topk of (x - b_dec) W_enc^T + b_enc, a chunk of rows at a time, on unrounded
// sums.
#include "cuda/encode_by_score.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor> encode_topk(const Tensor& x, const Tensor& W_enc,
                                       std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
                                       int64_t k, std::optional<Tensor> mask, bool relu,
                                       bool absolute, bool bf16_product) {
  constexpr const char* op = "encode_topk";
  format_of(op, "x", x);
  const DeviceScope device(x);
  const EncoderArguments in = encoder_input(op, x, W_enc, b_enc, b_dec, mask, bf16_product);
  check_k(op, k, in.d_sae);
  const int64_t n = x.size(0);
  Tensor values = new_empty(x, {n, k}, accumulator_type(x));
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  const Format format = format_of(op, "x", values);
  if (absolute) {
    Tensor buffer = new_empty(x, {chunks_of(in).rows, in.d_sae}, accumulator_type(x));
    return encode_by_score(op, in, x, k, relu, device.stream(),
                           [&](const void* pre, int64_t, int64_t rows) {
                             const ScoreParams params{latent_rows(in, pre, rows), nullptr, 1.0,
                                                      false, buffer.mutable_data_ptr()};
                             check_launch(op, launch_scores(params, format, device.stream()));
                             return buffer;
                           });
  }
  for_each_chunk(in, [&](const void* pre, int64_t first, int64_t rows) {
    Tensor some_values = values, some_indices = indices;
    some_values = torch::stable::narrow(some_values, 0, first, rows);
    some_indices = torch::stable::narrow(some_indices, 0, first, rows);
    TopkParams params{pre,
                      in.b_enc ? in.b_enc->const_data_ptr() : nullptr,
                      in.mask ? data_of<bool>(*in.mask) : nullptr,
                      rows,
                      static_cast<int32_t>(in.d_sae),
                      static_cast<int32_t>(k),
                      false,
                      relu,
                      some_values.mutable_data_ptr(),
                      mutable_data_of<int32_t>(some_indices)};
    Tensor space = scratch(x, topk_scratch(params, format));
    params.scratch = space.mutable_data_ptr();
    check_launch(op, launch_topk(params, format, device.stream()));
  });
  return {torch::stable::to(values, x.scalar_type()), indices};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("encode_topk", TORCH_BOX(&encode_topk));
}

}  // namespace fastsae::cuda
