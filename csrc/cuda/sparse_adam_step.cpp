// The operator sparse_adam_step_ on CUDA: check, allocate, launch, register.
#include "sparse_adam_call.h"

#include "cuda/sparse_adam_step.h"
#include "cuda/sparse_acts_args.h"

namespace fastsae::cuda {
namespace {

void run(AdamCall& c) {
  constexpr const char* op = AdamCall::kOp;
  FASTSAE_CHECK(!c.enc_indices && c.W_enc.size(1) == c.W_dec.size(1), op,
                ": expected one code for encoder and decoder, of the same width, on CUDA");
  FASTSAE_CHECK(!c.grad_W_enc && !c.grad_W_dec, op,
                ": expected gradients of matrices as extra rows on CUDA");
  for (const Tensor* t : {&c.W_dec, &c.b_enc, &c.b_dec, &c.m_W_enc, &c.m_W_dec, &c.m_b_enc,
                          &c.m_b_dec, &c.v_W_enc, &c.v_W_dec, &c.v_b_enc, &c.v_b_dec}) {
    check_device(op, "parameters and averages", *t, c.W_enc, "W_enc");
  }
  check_device(op, "grad_values", c.grad_values, c.W_enc, "W_enc");
  check_device(op, "x", c.x, c.W_enc, "W_enc");
  check_device(op, "grad_output", c.grad_output, c.W_enc, "W_enc");
  for (const std::optional<Tensor>* t : {&c.extra_latents, &c.extra_W_enc, &c.extra_W_dec,
                                         &c.extra_b_enc, &c.grad_b_enc, &c.grad_b_dec, &c.clip}) {
    if (*t) check_device(op, "more gradients", **t, c.W_enc, "W_enc");
  }
  check_d_sae(op, c.W_enc.size(0));
  const DeviceScope device(c.W_enc);
  const Format format = format_of(op, "W_enc", c.W_enc);
  const SparseActsArgs e = checked_sparse_acts(op, c.values, c.indices, c.offsets, c.W_enc.size(0),
                                               c.W_enc.scalar_type(), "W_enc", c.W_enc);
  const Tensor grad = as_contiguous(c.grad_values), grad_output = as_contiguous(c.grad_output);
  const auto parameter = [](Tensor& p, Tensor& m, Tensor& v) {
    return ParameterParams{p.mutable_data_ptr(), m.mutable_data_ptr(), v.mutable_data_ptr()};
  };
  AdamParams params{parameter(c.W_enc, c.m_W_enc, c.v_W_enc),
                    parameter(c.W_dec, c.m_W_dec, c.v_W_dec),
                    parameter(c.b_enc, c.m_b_enc, c.v_b_enc),
                    parameter(c.b_dec, c.m_b_dec, c.v_b_dec),
                    e.params,
                    grad.const_data_ptr(),
                    grad_output.const_data_ptr(),
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr,
                    0,
                    c.grad_b_enc ? c.grad_b_enc->const_data_ptr() : nullptr,
                    c.grad_b_dec ? c.grad_b_dec->const_data_ptr() : nullptr,
                    c.clip ? mutable_data_of<double>(*c.clip) : nullptr,
                    static_cast<int32_t>(c.W_enc.size(1)),
                    c.constants(),
                    c.max_norm,
                    c.unit_norm,
                    c.apply_b_dec,
                    c.by_rows(),
                    false};
  Tensor extra = c.W_enc, extra_enc = c.W_enc, extra_dec = c.W_enc, extra_b = c.W_enc;
  if (c.extra_latents) {
    extra = as_contiguous(*c.extra_latents);
    extra_enc = as_contiguous(*c.extra_W_enc);
    extra_dec = as_contiguous(*c.extra_W_dec);
    extra_b = as_contiguous(*c.extra_b_enc);
    params.extra_latents = data_of<int32_t>(extra);
    params.extra_W_enc = extra_enc.const_data_ptr();
    params.extra_W_dec = extra_dec.const_data_ptr();
    params.extra_b_enc = extra_b.const_data_ptr();
    params.extra_count = static_cast<int32_t>(extra.numel());
  }
  params.bf16_rows = c.bf16_rows && takes_bf16_rows(params, format);
  const auto gathered = [&](const Tensor& t) {
    return as_contiguous(params.bf16_rows ? torch::stable::to(t, ScalarType::BFloat16) : t);
  };
  const Tensor grad_rows = gathered(grad_output);
  const Tensor centered_rows =
      gathered(c.apply_b_dec ? torch::stable::subtract(c.x, c.b_dec) : c.x);
  params.grad_rows = grad_rows.const_data_ptr();
  params.centered_rows = centered_rows.const_data_ptr();
  Tensor space = scratch(c.W_enc, sparse_adam_step_scratch(params, format));
  params.scratch = space.mutable_data_ptr();
  check_launch(op, launch_sparse_adam_step(params, format, device.stream()));
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("sparse_adam_step_", TORCH_BOX(&sparse_adam_step<&run>));
}

}  // namespace fastsae::cuda
