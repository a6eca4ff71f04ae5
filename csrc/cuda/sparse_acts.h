// Sparse activations as a launcher gets them. No torch, no CUDA.
#pragma once

#include "cuda/format.h"

namespace fastsae::cuda {

struct SparseActsParams {
  const void* values;      // [n, k] or [capacity]
  bool wide;               // values are in the accumulator's format, not the matrix's
  const int32_t* indices;  // like values
  const int32_t* offsets;  // [n + 1], or null: k entries in every row
  int64_t n;
  int32_t k;
  int32_t capacity;  // entries there is room for
  int32_t d_sae;     // an entry whose index is not below is ignored
};

}  // namespace fastsae::cuda
