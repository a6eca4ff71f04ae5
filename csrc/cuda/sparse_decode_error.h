// What the operator and the launcher of the CUDA sparse_decode_error agree on. No torch, no CUDA.
#pragma once

#include "cuda/sparse_acts.h"

namespace fastsae::cuda {

struct DecodeErrorParams {
  SparseActsParams entries;
  const void* W;       // [d_sae, d]
  const void* bias;    // [d] or null
  const void* target;  // [n, d]
  int32_t d;
  void* out;       // [n, d], in the format of target; the others in that of sums
  void* error;     // [n, d]
  void* squared;   // [n]
  void* products;  // in the shape of the values
};

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text. rows:
// the format of W; others: of bias and target, which is that of W, or float32 where W is bfloat16.
const char* launch_sparse_decode_error(const DecodeErrorParams& params, Format rows, Format others,
                                       void* stream);

}  // namespace fastsae::cuda
