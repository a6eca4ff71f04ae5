// encode_topk by the product on Hopper that selects: which calls it serves, and the call.
#pragma once

#include "cuda/encode_plan.h"
#include "cuda/encoder.h"
#include "cuda/hopper_topk.h"
#include "cuda/row_candidates.h"

namespace fastsae::cuda {

// The factors as bfloat16, or nothing where they are not: of other dtypes, or not as the copy
// engine wants them (d_in a multiple of 8, from a multiple of 16 bytes on).
inline std::optional<std::pair<Tensor, Tensor>> hopper_factors(const EncoderArguments& in,
                                                               bool bfloat16) {
  if (!bfloat16) return std::nullopt;
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

// False, and nothing has happened, where the setting is another one or the call is not served.
inline bool select_on_hopper(const char* op, const EncoderArguments& in, bool bfloat16, int64_t k,
                             bool relu, bool absolute, void* stream, Tensor& values,
                             Tensor& indices) {
  if (!encode_plan_is_hopper() || k > kMostCandidatesTaken || !has_hopper_topk()) return false;
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

}  // namespace fastsae::cuda
