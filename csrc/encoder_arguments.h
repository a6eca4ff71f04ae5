// What the encode ops read, checked once, on any device.
#pragma once

#include <optional>

#include "check.h"
#include "dispatch.h"
#include "torch.h"

namespace fastsae {

struct EncoderArguments {
  Tensor x;                     // [n, d], contiguous like all of them
  Tensor W_enc;                 // [F, d]
  std::optional<Tensor> b_enc;  // [F] in the accumulator dtype
  std::optional<Tensor> b_dec;  // [d]
  std::optional<Tensor> mask;   // [F]: the latents that take part
  bool bf16_product = false;    // W_enc and x - b_dec are rounded to bfloat16 where that is faster
  int64_t d_sae = 0;
};

inline EncoderArguments encoder_arguments(const char* op, const Tensor& x, const Tensor& W_enc,
                                          const std::optional<Tensor>& b_enc,
                                          const std::optional<Tensor>& b_dec,
                                          const std::optional<Tensor>& mask, bool bf16_product) {
  check_matrix(op, "x", x);
  check_matrix(op, "W_enc", W_enc);
  FASTSAE_CHECK(x.size(1) == W_enc.size(1), op,
                ": expected x to be [n, d_in] with d_in = ", W_enc.size(1), ", got ", shape_of(x));
  check_same_type(op, "W_enc", W_enc, x.scalar_type());
  EncoderArguments in;
  in.bf16_product = bf16_product;
  in.d_sae = W_enc.size(0);
  in.x = as_contiguous(x);
  in.W_enc = as_contiguous(W_enc);
  if (b_dec) {
    check_vector(op, "b_dec", *b_dec, x.size(1));
    check_same_type(op, "b_dec", *b_dec, x.scalar_type());
    in.b_dec = as_contiguous(*b_dec);
  }
  if (b_enc) {
    check_vector(op, "b_enc", *b_enc, in.d_sae);
    check_same_type(op, "b_enc", *b_enc, x.scalar_type());
    in.b_enc = as_contiguous(torch::stable::to(*b_enc, accumulator_type(x)));
  }
  if (mask) {
    check_vector(op, "mask", *mask, in.d_sae);
    FASTSAE_CHECK(mask->scalar_type() == ScalarType::Bool, op, ": expected mask to be bool");
    in.mask = as_contiguous(*mask);
  }
  return in;
}

}  // namespace fastsae
