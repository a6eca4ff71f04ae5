// What the operator and the launcher of the CUDA sparse_decode_values_grad agree on. No torch, no
// CUDA.
#pragma once

#include "cuda/sparse_acts.h"

namespace fastsae::cuda {

struct ValuesGradParams {
  SparseActsParams entries;
  const void* grad;  // [n, d]
  const void* W;     // [d_sae, d]
  int32_t d;
  void* out;  // like the values, in their format
};

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text. rows:
// the format of W; others: of the rest, which is that of W, or float32 where W is bfloat16.
const char* launch_sparse_decode_values_grad(const ValuesGradParams& params, Format rows,
                                             Format others, void* stream);

}  // namespace fastsae::cuda
