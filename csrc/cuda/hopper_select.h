// A selection as in matrix_select.h from x W^T on Hopper, selected where the product is computed:
// what the operators and the launcher share.
#pragma once

#include "cuda/block_select.h"

namespace fastsae::cuda {

struct HopperSelectParams {
  const void* x = nullptr;  // [n, d] bfloat16, contiguous, from a multiple of 16 bytes on
  const void* W = nullptr;  // [m, d], the same
  int32_t d = 0;            // a multiple of 8, at least 8
  BlockSelectParams
      select;  // of float32, n and m at least 1; the sizes of blocks are not looked at
};

int64_t hopper_select_scratch(const HopperSelectParams& params);

// Null, or what is wrong.
const char* launch_hopper_select(const HopperSelectParams& params, void* stream);

}  // namespace fastsae::cuda
