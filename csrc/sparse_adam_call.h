// The arguments of sparse_adam_step_, checked as far as shapes and dtypes go: the same on every
// device.
#pragma once

#include "adam_rate.h"
#include "check.h"

namespace fastsae {

struct AdamCall {
  Tensor W_enc, W_dec, b_enc, b_dec, m_W_enc, m_W_dec, m_b_enc, m_b_dec, v_W_enc, v_W_dec, v_b_enc,
      v_b_dec;             // changed in place
  Tensor values, indices;  // entries of the rows of grad_output: the decoder's
  std::optional<Tensor> offsets;
  Tensor grad_output;
  Tensor grad_values;  // entries of the rows of x: the encoder's, the same ones without enc_indices
  std::optional<Tensor> enc_indices, enc_offsets;
  Tensor x;
  std::optional<Tensor> extra_latents, extra_W_enc, extra_W_dec, extra_b_enc;
  std::optional<Tensor> grad_W_enc, grad_W_dec, grad_b_enc, grad_b_dec;
  std::optional<Tensor> clip;  // [2] squared norm of other gradients; gets the factor
  double lr, beta1, beta2, eps;
  int64_t step;
  double max_norm;
  bool unit_norm;
  bool apply_b_dec;  // b_dec is subtracted from x
  bool bf16_rows;  // x - b_dec and grad_output are rounded to bfloat16 for the matrices where that
                   // is faster
  std::optional<Tensor> lr_tensor, step_tensor;  // [] float64 and int64: in place of lr and step
  std::optional<Tensor> bf16_W_enc, bf16_W_dec;  // get the new matrices in bfloat16
  int64_t rounding_seed;  // of averages of matrices in bfloat16, which are rounded stochastically

  static constexpr const char* kOp = "sparse_adam_step_";

  AdamSettings<double> settings() const { return {1.0 - beta1, beta2, 1.0 - beta2, eps}; }

  // Whether the averages of squares of both matrices have one number for each row.
  bool by_rows() const { return v_W_enc.dim() == 1; }

  // Whether both averages of both matrices are bfloat16.
  bool bf16_averages() const { return m_W_enc.scalar_type() == ScalarType::BFloat16; }

  void check() const {
    check_matrix(kOp, "W_enc", W_enc);
    FASTSAE_CHECK(
        W_enc.scalar_type() == ScalarType::Float || W_enc.scalar_type() == ScalarType::Double, kOp,
        ": expected W_enc to be float32 or float64");
    const int64_t d_sae = W_enc.size(0), d_in = W_enc.size(1), d_out = b_dec.numel();
    check_vector(kOp, "b_enc", b_enc, d_sae);
    check_vector(kOp, "b_dec", b_dec, d_out);
    check_rows("W_dec", W_dec, d_sae, d_out);
    FASTSAE_CHECK(!apply_b_dec || d_in == d_out, kOp,
                  ": expected b_dec to be [d_in] with d_in = ", d_in,
                  " where it is subtracted from x, got ", shape_of(b_dec));
    check_state("W_enc and its state", W_enc, W_enc);
    check_state("W_dec and its state", W_dec, W_dec);
    FASTSAE_CHECK(!bf16_averages() || (W_enc.scalar_type() == ScalarType::Float && !by_rows()), kOp,
                  ": expected float32 parameters, and squares of every number, with averages in "
                  "bfloat16");
    check_average("W_enc and its state", m_W_enc, W_enc);
    check_average("W_dec and its state", m_W_dec, W_dec);
    check_average("the average of squares of W_enc", v_W_enc, by_rows() ? b_enc : W_enc);
    check_average("the average of squares of W_dec", v_W_dec, by_rows() ? b_enc : W_dec);
    for (const Tensor* t : {&b_enc, &m_b_enc, &v_b_enc}) {
      check_state("b_enc and its state", *t, b_enc);
    }
    for (const Tensor* t : {&b_dec, &m_b_dec, &v_b_dec}) {
      check_state("b_dec and its state", *t, b_dec);
    }
    FASTSAE_CHECK(
        b_enc.scalar_type() == W_enc.scalar_type() && b_dec.scalar_type() == W_enc.scalar_type(),
        kOp, ": expected biases with the dtype of W_enc");
    FASTSAE_CHECK(values.scalar_type() == W_enc.scalar_type(), kOp,
                  ": expected values to have the dtype of W_enc");
    check_entries_layout(kOp, values, indices, offsets);
    const int64_t n = rows_of(values, offsets);
    FASTSAE_CHECK(grad_values.scalar_type() == W_enc.scalar_type(), kOp,
                  ": expected grad_values to have the dtype of W_enc");
    int64_t n_enc = n;
    if (enc_indices) {
      check_entries_layout(kOp, grad_values, *enc_indices, enc_offsets);
      n_enc = rows_of(grad_values, enc_offsets);
    } else {
      FASTSAE_CHECK(grad_values.dim() == values.dim() && grad_values.numel() == values.numel(), kOp,
                    ": expected grad_values to be like values, got ", shape_of(grad_values));
    }
    check_rows("x", x, n_enc, d_in);
    check_rows("grad_output", grad_output, n, d_out);
    FASTSAE_CHECK(step_tensor || step >= 1, kOp, ": expected step >= 1, got ", step);
    check_number("lr_tensor", lr_tensor, ScalarType::Double, "float64");
    check_number("step_tensor", step_tensor, ScalarType::Long, "int64");
    if (grad_W_enc) check_rows("grad_W_enc", *grad_W_enc, d_sae, d_in);
    if (grad_W_dec) check_rows("grad_W_dec", *grad_W_dec, d_sae, d_out);
    if (grad_b_enc) check_state("grad_b_enc", *grad_b_enc, b_enc);
    if (grad_b_dec) check_state("grad_b_dec", *grad_b_dec, b_dec);
    check_copy("bf16_W_enc", bf16_W_enc, W_enc);
    check_copy("bf16_W_dec", bf16_W_dec, W_dec);
    if (clip) {
      check_vector(kOp, "clip", *clip, 2);
      FASTSAE_CHECK(clip->scalar_type() == ScalarType::Double && clip->is_contiguous(), kOp,
                    ": expected clip to be float64 and contiguous");
    }
    if (!extra_latents) return;
    FASTSAE_CHECK(extra_W_enc && extra_W_dec && extra_b_enc, kOp,
                  ": expected extra_W_enc, extra_W_dec and extra_b_enc with extra_latents");
    check_int32(kOp, "extra_latents", *extra_latents);
    const int64_t count = extra_latents->numel();
    check_vector(kOp, "extra_latents", *extra_latents, count);
    check_rows("extra_W_enc", *extra_W_enc, count, d_in);
    check_rows("extra_W_dec", *extra_W_dec, count, d_out);
    check_vector(kOp, "extra_b_enc", *extra_b_enc, count);
    FASTSAE_CHECK(extra_b_enc->scalar_type() == W_enc.scalar_type(), kOp,
                  ": expected extra_b_enc to have the dtype of W_enc");
  }

 private:
  static int64_t rows_of(const Tensor& values, const std::optional<Tensor>& offsets) {
    return offsets ? offsets->size(0) - 1 : values.size(0);
  }
  static bool is_like(const Tensor& t, const Tensor& like, ScalarType type) {
    bool same = t.dim() == like.dim() && t.scalar_type() == type && t.is_contiguous();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
    return same;
  }
  static void check_state(const char* name, const Tensor& t, const Tensor& like) {
    FASTSAE_CHECK(is_like(t, like, like.scalar_type()), kOp, ": expected ", name,
                  " to be contiguous, with the dtype of W_enc and ", shape_of(like), ", got ",
                  shape_of(t));
  }
  // Of a matrix.
  void check_average(const char* name, const Tensor& t, const Tensor& like) const {
    if (!bf16_averages()) return check_state(name, t, like);
    FASTSAE_CHECK(is_like(t, like, ScalarType::BFloat16), kOp, ": expected ", name,
                  " to be contiguous, bfloat16 like all averages of matrices and ", shape_of(like),
                  ", got ", shape_of(t));
  }
  static void check_number(const char* name, const std::optional<Tensor>& t, ScalarType type,
                           const char* type_name) {
    FASTSAE_CHECK(!t || (t->dim() == 0 && t->scalar_type() == type), kOp, ": expected ", name,
                  " to be [] ", type_name);
  }
  static void check_copy(const char* name, const std::optional<Tensor>& t, const Tensor& W) {
    if (!t) return;
    FASTSAE_CHECK(W.scalar_type() == ScalarType::Float, kOp, ": expected float32 parameters with ",
                  name);
    FASTSAE_CHECK(t->scalar_type() == ScalarType::BFloat16 && t->is_contiguous() && t->dim() == 2 &&
                      t->size(0) == W.size(0) && t->size(1) == W.size(1),
                  kOp, ": expected ", name, " to be contiguous, bfloat16 and ", shape_of(W),
                  ", got ", shape_of(*t));
  }
  void check_rows(const char* name, const Tensor& t, int64_t n, int64_t d) const {
    FASTSAE_CHECK(
        t.dim() == 2 && t.size(0) == n && t.size(1) == d && t.scalar_type() == W_enc.scalar_type(),
        kOp, ": expected ", name, " to be [", n, ", ", d, "] with the dtype of W_enc, got ",
        shape_of(t));
  }
};

// The operator, for the registration of a device: checks its arguments and hands them to `run`.
template <void (*run)(AdamCall&)>
void sparse_adam_step(Tensor W_enc, Tensor W_dec, Tensor b_enc, Tensor b_dec, Tensor m_W_enc,
                      Tensor m_W_dec, Tensor m_b_enc, Tensor m_b_dec, Tensor v_W_enc,
                      Tensor v_W_dec, Tensor v_b_enc, Tensor v_b_dec, Tensor values, Tensor indices,
                      std::optional<Tensor> offsets, Tensor grad_output, Tensor grad_values,
                      std::optional<Tensor> enc_indices, std::optional<Tensor> enc_offsets,
                      Tensor x, std::optional<Tensor> extra_latents,
                      std::optional<Tensor> extra_W_enc, std::optional<Tensor> extra_W_dec,
                      std::optional<Tensor> extra_b_enc, std::optional<Tensor> grad_W_enc,
                      std::optional<Tensor> grad_W_dec, std::optional<Tensor> grad_b_enc,
                      std::optional<Tensor> grad_b_dec, std::optional<Tensor> clip, double lr,
                      double beta1, double beta2, double eps, int64_t step, double max_norm,
                      bool unit_norm, bool apply_b_dec, bool bf16_rows,
                      std::optional<Tensor> lr_tensor, std::optional<Tensor> step_tensor,
                      std::optional<Tensor> bf16_W_enc, std::optional<Tensor> bf16_W_dec,
                      int64_t rounding_seed) {
  AdamCall call{W_enc,        W_dec,      b_enc,         b_dec,       m_W_enc,     m_W_dec,
                m_b_enc,      m_b_dec,    v_W_enc,       v_W_dec,     v_b_enc,     v_b_dec,
                values,       indices,    offsets,       grad_output, grad_values, enc_indices,
                enc_offsets,  x,          extra_latents, extra_W_enc, extra_W_dec, extra_b_enc,
                grad_W_enc,   grad_W_dec, grad_b_enc,    grad_b_dec,  clip,        lr,
                beta1,        beta2,      eps,           step,        max_norm,    unit_norm,
                apply_b_dec,  bf16_rows,  lr_tensor,     step_tensor, bf16_W_enc,  bf16_W_dec,
                rounding_seed};
  call.check();
  run(call);
}

}  // namespace fastsae
