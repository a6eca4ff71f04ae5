// What the operator and the launcher of the CUDA sparse_decode agree on. No torch, no CUDA.
#pragma once

#include "cuda/sparse_acts.h"

namespace fastsae::cuda {

struct DecodeParams {
  SparseActsParams entries;
  const void* W;     // [d_sae, d]
  const void* bias;  // [d] or null
  int32_t d;
  void* out;  // [n, d]
};

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text. rows:
// the format of W; others: of the rest, which is that of W, or float32 where W is bfloat16.
const char* launch_sparse_decode(const DecodeParams& params, Format rows, Format others,
                                 void* stream);

}  // namespace fastsae::cuda
