// The inputs of the encode ops, checked once, on any device.
#pragma once

#include <algorithm>
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
  std::optional<Tensor> mask;   // [F]: the latents that are eligible
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
  // A float32 matrix that would be rounded to bfloat16 may come rounded.
  const bool rounded = bf16_product && x.scalar_type() == ScalarType::Float &&
                       W_enc.scalar_type() == ScalarType::BFloat16;
  if (!rounded) check_same_type(op, "W_enc", W_enc, x.scalar_type());
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

inline void check_groups(const char* op, int64_t k, int64_t d_sae) {
  FASTSAE_CHECK(k >= 1 && k <= d_sae && d_sae % k == 0, op,
                ": expected k to divide d_sae = ", d_sae, ", got k = ", k);
}

// The factors of the effects grad W_dec^T on what x passes through, and their weight.
inline void check_effects(const char* op, const Tensor& x, int64_t d_sae, const Tensor& grad,
                          const Tensor& W_dec, double beta) {
  check_matrix(op, "grad", grad);
  check_matrix(op, "W_dec", W_dec);
  FASTSAE_CHECK(W_dec.size(0) == d_sae, op,
                ": expected W_dec to be [d_sae, d_out] with d_sae = ", d_sae, ", got ",
                shape_of(W_dec));
  FASTSAE_CHECK(grad.size(0) == x.size(0) && grad.size(1) == W_dec.size(1), op,
                ": expected grad to be [", x.size(0), ", ", W_dec.size(1), "], got ",
                shape_of(grad));
  check_same_type(op, "grad", grad, x.scalar_type());
  check_same_type(op, "W_dec", W_dec, x.scalar_type());
  FASTSAE_CHECK(beta > 0 && beta - beta == 0, op, ": expected 0 < beta < inf, got ", beta);
}

// How n rows of pre-activations are cut into chunks: `count` of them, all but the last of `rows`.
struct RowChunks {
  int64_t count, rows;
};

// Chunks of about `bytes`, but of at least min_rows rows, which keep a GEMM efficient; `multiple`
// divides their rows. All about equal: no small one at the end.
inline RowChunks row_chunks(int64_t n, int64_t row_bytes, int64_t bytes, int64_t min_rows,
                            int64_t multiple) {
  const int64_t fitting = std::max(min_rows, bytes / std::max<int64_t>(1, row_bytes));
  const int64_t count = (n + fitting - 1) / fitting;
  if (count == 0) return {0, 0};
  const int64_t rows = (n + count - 1) / count;
  return {count, std::min(fitting, (rows + multiple - 1) / multiple * multiple)};
}

}  // namespace fastsae
