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

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_sparse_decode(const DecodeParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
