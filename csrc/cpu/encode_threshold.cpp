// The entries of (x - b_dec) W_enc^T + b_enc above the threshold, in the variable layout: the
// `capacity` largest of them if there are more.
#include "cpu/encode_select.h"

namespace fastsae::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> encode_threshold(const Tensor& x, const Tensor& W_enc,
                                                    std::optional<Tensor> b_enc,
                                                    std::optional<Tensor> b_dec,
                                                    const Tensor& threshold_in, int64_t capacity_in,
                                                    bool bf16_product) {
  constexpr const char* op = "encode_threshold";
  const EncoderInput in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt, bf16_product);
  const Tensor threshold = as_contiguous(threshold_in);
  check_threshold(op, threshold, x, in.d_sae);
  const int64_t capacity = selection_capacity(op, "capacity", capacity_in, x.size(0), in.d_sae);
  return dispatch_product(op, in, [&](auto type, auto word) {
    using T = typename decltype(type)::type;
    using W = typename decltype(word)::type;
    return encode_select<T, W>(in, capacity, data_of<Acc<T>>(threshold), threshold.dim() != 0, true,
                               nullptr)
        .entries();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("encode_threshold", TORCH_BOX(&encode_threshold));
}

}  // namespace fastsae::cpu
