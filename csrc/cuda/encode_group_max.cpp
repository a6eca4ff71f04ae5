// encode_group_max on CUDA: a chunk of rows at a time, on unrounded sums.
#include "cuda/encode_by_score.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor> encode_group_max(const Tensor& x, const Tensor& W_enc,
                                            std::optional<Tensor> b_enc,
                                            std::optional<Tensor> b_dec, int64_t k,
                                            bool bf16_product) {
  constexpr const char* op = "encode_group_max";
  format_of(op, "x", x);
  const DeviceScope device(x);
  const EncoderArguments in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt, bf16_product);
  check_groups(op, k, in.d_sae);
  const int64_t n = x.size(0);
  Tensor values = new_empty(x, {n, k}, accumulator_type(x));
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  const Format format = format_of(op, "x", values);
  for_each_chunk(in, [&](const void* pre, int64_t first, int64_t rows) {
    Tensor some_values = values, some_indices = indices;
    some_values = torch::stable::narrow(some_values, 0, first, rows);
    some_indices = torch::stable::narrow(some_indices, 0, first, rows);
    const GroupMaxParams params{latent_rows(in, pre, rows), static_cast<int32_t>(k),
                                some_values.mutable_data_ptr(),
                                mutable_data_of<int32_t>(some_indices)};
    check_launch(op, launch_group_max(params, format, device.stream()));
  });
  return {torch::stable::to(values, x.scalar_type()), indices};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("encode_group_max", TORCH_BOX(&encode_group_max));
}

}  // namespace fastsae::cuda
