// The arguments of sparse_adam_step_, checked as far as shapes and dtypes go: the same on every
// device.
#pragma once

#include <cmath>

#include "adam_constants.h"
#include "check.h"

namespace fastsae {

struct AdamCall {
  Tensor W_enc, W_dec, b_enc, b_dec, m_W_enc, m_W_dec, m_b_enc, m_b_dec, v_W_enc, v_W_dec, v_b_enc,
      v_b_dec;  // changed in place
  Tensor values, grad_values, indices;
  std::optional<Tensor> offsets;
  Tensor x, grad_output;
  std::optional<Tensor> extra_latents, extra_W_enc, extra_W_dec, extra_b_enc;
  double lr, beta1, beta2, eps;
  int64_t step;
  double max_norm;
  bool unit_norm;
  bool bf16_rows;  // x - b_dec and grad_output are rounded to bfloat16 for the matrices where that
                   // is faster

  static constexpr const char* kOp = "sparse_adam_step_";

  AdamConstants<double> constants() const {
    return {1.0 - beta1,
            beta2,
            1.0 - beta2,
            lr / (1.0 - std::pow(beta1, static_cast<double>(step))),
            1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step))),
            eps};
  }

  // Whether the averages of squares of both matrices have one number for each row.
  bool by_rows() const { return v_W_enc.dim() == 1; }

  void check() const {
    check_matrix(kOp, "W_enc", W_enc);
    FASTSAE_CHECK(
        W_enc.scalar_type() == ScalarType::Float || W_enc.scalar_type() == ScalarType::Double, kOp,
        ": expected W_enc to be float32 or float64");
    const int64_t d_sae = W_enc.size(0), d = W_enc.size(1);
    check_vector(kOp, "b_enc", b_enc, d_sae);
    check_vector(kOp, "b_dec", b_dec, d);
    for (const Tensor* t : {&W_enc, &W_dec, &m_W_enc, &m_W_dec}) {
      check_state("every matrix", *t, W_enc);
    }
    for (const Tensor* t : {&v_W_enc, &v_W_dec}) {
      check_state("both averages of squares", *t, by_rows() ? b_enc : W_enc);
    }
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
    const int64_t n = offsets ? offsets->size(0) - 1 : values.size(0);
    FASTSAE_CHECK(grad_values.dim() == values.dim() && grad_values.numel() == values.numel() &&
                      grad_values.scalar_type() == values.scalar_type(),
                  kOp, ": expected grad_values to be like values, got ", shape_of(grad_values));
    check_rows("x", x, n);
    check_rows("grad_output", grad_output, n);
    FASTSAE_CHECK(step >= 1, kOp, ": expected step >= 1, got ", step);
    if (!extra_latents) return;
    FASTSAE_CHECK(extra_W_enc && extra_W_dec && extra_b_enc, kOp,
                  ": expected extra_W_enc, extra_W_dec and extra_b_enc with extra_latents");
    check_int32(kOp, "extra_latents", *extra_latents);
    const int64_t count = extra_latents->numel();
    check_vector(kOp, "extra_latents", *extra_latents, count);
    check_rows("extra_W_enc", *extra_W_enc, count);
    check_rows("extra_W_dec", *extra_W_dec, count);
    check_vector(kOp, "extra_b_enc", *extra_b_enc, count);
    FASTSAE_CHECK(extra_b_enc->scalar_type() == W_enc.scalar_type(), kOp,
                  ": expected extra_b_enc to have the dtype of W_enc");
  }

 private:
  static void check_state(const char* name, const Tensor& t, const Tensor& like) {
    bool same = t.dim() == like.dim() && t.scalar_type() == like.scalar_type() && t.is_contiguous();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
    FASTSAE_CHECK(same, kOp, ": expected ", name, " to be contiguous, with the dtype of W_enc and ",
                  shape_of(like), ", got ", shape_of(t));
  }
  void check_rows(const char* name, const Tensor& t, int64_t n) const {
    FASTSAE_CHECK(t.dim() == 2 && t.size(0) == n && t.size(1) == W_enc.size(1) &&
                      t.scalar_type() == W_enc.scalar_type(),
                  kOp, ": expected ", name, " to be [", n, ", ", W_enc.size(1),
                  "] with the dtype of W_enc, got ", shape_of(t));
  }
};

// The operator, for the registration of a device: checks its arguments and hands them to `run`.
template <void (*run)(AdamCall&)>
void sparse_adam_step(Tensor W_enc, Tensor W_dec, Tensor b_enc, Tensor b_dec, Tensor m_W_enc,
                      Tensor m_W_dec, Tensor m_b_enc, Tensor m_b_dec, Tensor v_W_enc,
                      Tensor v_W_dec, Tensor v_b_enc, Tensor v_b_dec, Tensor values,
                      Tensor grad_values, Tensor indices, std::optional<Tensor> offsets, Tensor x,
                      Tensor grad_output, std::optional<Tensor> extra_latents,
                      std::optional<Tensor> extra_W_enc, std::optional<Tensor> extra_W_dec,
                      std::optional<Tensor> extra_b_enc, double lr, double beta1, double beta2,
                      double eps, int64_t step, double max_norm, bool unit_norm, bool bf16_rows) {
  AdamCall call{W_enc,         W_dec,       b_enc,       b_dec,       m_W_enc,   m_W_dec,
                m_b_enc,       m_b_dec,     v_W_enc,     v_W_dec,     v_b_enc,   v_b_dec,
                values,        grad_values, indices,     offsets,     x,         grad_output,
                extra_latents, extra_W_enc, extra_W_dec, extra_b_enc, lr,        beta1,
                beta2,         eps,         step,        max_norm,    unit_norm, bf16_rows};
  call.check();
  run(call);
}

}  // namespace fastsae
