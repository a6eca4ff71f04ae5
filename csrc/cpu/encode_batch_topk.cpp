// The `budget` largest positive entries of (x - b_dec) W_enc^T + b_enc in the variable layout.
#include "cpu/encode_select.h"

namespace fastsae::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_batch_topk(
    const Tensor& x, const Tensor& W_enc, std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
    int64_t budget, std::optional<Tensor> mask, bool bf16_product, std::optional<Tensor> guess_in) {
  constexpr const char* op = "encode_batch_topk";
  const EncoderInput in = encoder_input(op, x, W_enc, b_enc, b_dec, mask, bf16_product);
  const int64_t capacity = selection_capacity(op, "budget", budget, x.size(0), in.d_sae);
  const std::optional<Tensor> guess = threshold_guess(op, guess_in, x);
  return dispatch_product(op, in, [&](auto type, auto word) {
    using T = typename decltype(type)::type;
    using W = typename decltype(word)::type;
    const Acc<T> zero = 0;
    const Acc<T>* guessed = guess ? data_of<Acc<T>>(*guess) : nullptr;
    return encode_select<T, W>(in, capacity, &zero, false, false, guessed).entries_and_threshold();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("encode_batch_topk", TORCH_BOX(&encode_batch_topk));
}

}  // namespace fastsae::cpu
