// The encode ops by the product on Hopper that selects: which calls it serves, and the calls.
#pragma once

#include "cuda/encode_plan.h"
#include "cuda/encoder.h"
#include "cuda/hopper_product.h"
#include "cuda/hopper_select.h"
#include "cuda/hopper_topk.h"
#include "cuda/row_candidates.h"

namespace fastsae::cuda {

// Whether the op multiplies factors in bfloat16, given its input.
inline bool multiplies_bfloat16(const Tensor& x, bool bf16_product) {
  return x.scalar_type() == ScalarType::BFloat16 ||
         (bf16_product && x.scalar_type() == ScalarType::Float);
}

// The factors as bfloat16, or nothing where the setting is another one, or the GPU, or they are not
// served: of other dtypes, or not as the copy engine wants them (d_in a multiple of 8, from a
// multiple of 16 bytes on).
inline std::optional<std::pair<Tensor, Tensor>> hopper_factors(const EncoderArguments& in,
                                                               bool bfloat16) {
  if (!bfloat16 || !encode_plan_is_hopper() || !has_hopper_product()) return std::nullopt;
  Tensor x = in.x, W = in.W_enc;
#ifdef FASTSAE_EMULATED  // they have been widened; this is exact
  x = torch::stable::to(x, ScalarType::BFloat16);
  W = torch::stable::to(W, ScalarType::BFloat16);
#endif
  const auto fits = [](const Tensor& t) {
    return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  };
  if (x.size(1) == 0 || x.size(1) % 8 != 0 || !fits(x) || !fits(W)) return std::nullopt;
  return std::pair{x, W};
}

// False, and nothing has happened, where the call is not served.
inline bool topk_on_hopper(const char* op, const EncoderArguments& in, bool bfloat16, int64_t k,
                           bool relu, bool absolute, void* stream, Tensor& values,
                           Tensor& indices) {
  if (k > kMostCandidatesTaken) return false;
  const auto factors = hopper_factors(in, bfloat16);
  if (!factors) return false;
  const auto& [x, W] = *factors;
  HopperTopkParams params{x.const_data_ptr(),
                          W.const_data_ptr(),
                          in.b_enc ? data_of<float>(*in.b_enc) : nullptr,
                          in.mask ? data_of<bool>(*in.mask) : nullptr,
                          static_cast<int32_t>(x.size(0)),
                          static_cast<int32_t>(in.d_sae),
                          static_cast<int32_t>(x.size(1)),
                          static_cast<int32_t>(k),
                          relu,
                          absolute,
                          mutable_data_of<float>(values),
                          mutable_data_of<int32_t>(indices),
                          nullptr};
  Tensor space = scratch(x, hopper_topk_scratch(params));
  params.scratch = space.mutable_data_ptr();
  check_launch(op, launch_hopper_topk(params, stream));
  return true;
}

// The same of a selection in the whole matrix; `select` lacks its scratch.
inline bool select_on_hopper(const char* op, const EncoderArguments& in, bool bfloat16,
                             const BlockSelectParams& select, void* stream) {
  constexpr int64_t kMostRows = (1 << 23) - 1;  // more leave places of candidates no 32 bits
  if (select.n == 0 || select.n > kMostRows || select.m == 0 || select.capacity == 0) return false;
  const auto factors = hopper_factors(in, bfloat16);
  if (!factors) return false;
  const auto& [x, W] = *factors;
  HopperSelectParams params{x.const_data_ptr(), W.const_data_ptr(), static_cast<int32_t>(x.size(1)),
                            select};
  Tensor space = scratch(x, hopper_select_scratch(params));
  params.select.scratch = space.mutable_data_ptr();
  check_launch(op, launch_hopper_select(params, stream));
  return true;
}

}  // namespace fastsae::cuda
