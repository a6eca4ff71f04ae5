// The k largest of each row of x W^T + bias on Hopper, selected where the product is computed: what
// the operator and the launcher share.
#pragma once

#include <cstdint>

namespace fastsae::cuda {

struct HopperTopkParams {
  const void* x;      // [n, d] bfloat16, contiguous, from a multiple of 16 bytes on
  const void* W;      // [m, d], the same
  const float* bias;  // [m] or null
  const bool* mask;   // [m]: others count as -inf, and have the value 0; or null
  int32_t n, m;
  int32_t d;      // a multiple of 8, at least 8
  int32_t k;      // at most m and kMostCandidatesTaken
  bool relu;      // negative values become 0
  bool absolute;  // by magnitude
  float* values;  // [n, k], in ascending index
  int32_t* indices;
  void* scratch;
};

// Bytes of `scratch`, aligned to 256: an eighth of the pre-activations, and lists of candidates.
int64_t hopper_topk_scratch(const HopperTopkParams& p);

// Null, or what is wrong.
const char* launch_hopper_topk(const HopperTopkParams& p, void* stream);

}  // namespace fastsae::cuda
