// The operator sparse_adam_step_ on CUDA: check, allocate, launch, register.
#include "sparse_adam_call.h"

#include "cuda/sparse_adam_step.h"
#include "cuda/sparse_acts_args.h"

namespace fastsae::cuda {
namespace {

void run(AdamCall& c) {
  constexpr const char* op = AdamCall::kOp;
  for (const Tensor* t : {&c.W_dec, &c.b_enc, &c.b_dec, &c.m_W_enc, &c.m_W_dec, &c.m_b_enc,
                          &c.m_b_dec, &c.v_W_enc, &c.v_W_dec, &c.v_b_enc, &c.v_b_dec}) {
    check_device(op, "parameters and averages", *t, c.W_enc, "W_enc");
  }
  check_device(op, "grad_values", c.grad_values, c.W_enc, "W_enc");
  check_device(op, "x", c.x, c.W_enc, "W_enc");
  check_device(op, "grad_output", c.grad_output, c.W_enc, "W_enc");
  for (const std::optional<Tensor>* t :
       {&c.extra_latents, &c.extra_W_enc, &c.extra_W_dec, &c.extra_b_enc, &c.grad_W_enc,
        &c.grad_W_dec, &c.grad_b_enc, &c.grad_b_dec, &c.clip}) {
    if (*t) check_device(op, "more gradients", **t, c.W_enc, "W_enc");
  }
  for (const std::optional<Tensor>* t : {&c.bf16_W_enc, &c.bf16_W_dec}) {
    if (*t) check_device(op, "copies", **t, c.W_enc, "W_enc");
  }
  for (const std::optional<Tensor>* t : {&c.lr_tensor, &c.step_tensor}) {
    if (*t) check_device(op, "lr and step", **t, c.W_enc, "W_enc");
  }
  check_d_sae(op, c.W_enc.size(0));
  const DeviceScope device(c.W_enc);
  const Format format = format_of(op, "W_enc", c.W_enc);
  const auto entries = [&](const Tensor& values, const Tensor& indices,
                           const std::optional<Tensor>& offsets) {
    return checked_sparse_acts(op, values, indices, offsets, c.W_enc.size(0), c.W_enc.scalar_type(),
                               "W_enc", c.W_enc);
  };
  const bool own = c.enc_indices.has_value();
  const SparseActsArgs dec = entries(c.values, c.indices, c.offsets);
  const SparseActsArgs enc = own ? entries(c.grad_values, *c.enc_indices, c.enc_offsets)
                                 : entries(c.grad_values, dec.indices, dec.offsets);
  const Tensor grad_output = as_contiguous(c.grad_output);
  const auto parameter = [](Tensor& p, Tensor& m, Tensor& v) {
    return ParameterParams{p.mutable_data_ptr(), m.mutable_data_ptr(), v.mutable_data_ptr()};
  };
  const auto copy = [](std::optional<Tensor>& t) {
    return t ? static_cast<uint16_t*>(t->mutable_data_ptr()) : nullptr;
  };
  // Contiguous, and alive as long as the parameters are in use.
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(as_contiguous(*t)) : std::nullopt;
  };
  const auto pointer = [](const std::optional<Tensor>& t) {
    return t ? t->const_data_ptr() : static_cast<const void*>(nullptr);
  };
  const std::optional<Tensor> extra = contiguous(c.extra_latents),
                              extra_enc = contiguous(c.extra_W_enc),
                              extra_dec = contiguous(c.extra_W_dec),
                              extra_b = contiguous(c.extra_b_enc);
  const std::optional<Tensor> more_enc = contiguous(c.grad_W_enc),
                              more_dec = contiguous(c.grad_W_dec);
  AdamParams params{parameter(c.W_enc, c.m_W_enc, c.v_W_enc),
                    parameter(c.W_dec, c.m_W_dec, c.v_W_dec),
                    parameter(c.b_enc, c.m_b_enc, c.v_b_enc),
                    parameter(c.b_dec, c.m_b_dec, c.v_b_dec),
                    dec.params,
                    enc.params,
                    own,
                    grad_output.const_data_ptr(),
                    nullptr,
                    nullptr,
                    extra ? data_of<int32_t>(*extra) : nullptr,
                    pointer(extra_enc),
                    pointer(extra_dec),
                    pointer(extra_b),
                    extra ? static_cast<int32_t>(extra->numel()) : 0,
                    pointer(more_enc),
                    pointer(more_dec),
                    pointer(c.grad_b_enc),
                    pointer(c.grad_b_dec),
                    c.clip ? mutable_data_of<double>(*c.clip) : nullptr,
                    static_cast<int32_t>(c.W_enc.size(1)),
                    static_cast<int32_t>(c.W_dec.size(1)),
                    c.lr,
                    c.beta1,
                    c.beta2,
                    c.step,
                    c.lr_tensor ? data_of<double>(*c.lr_tensor) : nullptr,
                    c.step_tensor ? data_of<int64_t>(*c.step_tensor) : nullptr,
                    c.settings(),
                    c.max_norm,
                    c.unit_norm,
                    c.apply_b_dec,
                    c.by_rows(),
                    c.bf16_averages(),
                    c.rounding_seed,
                    false,
                    copy(c.bf16_W_enc),
                    copy(c.bf16_W_dec)};
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
