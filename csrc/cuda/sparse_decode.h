// What the operators and the launchers of the CUDA sparse_decode agree on. No torch, no CUDA.
#pragma once

#include "cuda/entries.h"

namespace fastsae::cuda {

struct DecodeParams {
  EntriesParams entries;
  const void* W;     // [d_sae, d]
  const void* bias;  // [d] or null
  int32_t d;
  void* out;  // [n, d]
};

struct ValuesGradParams {
  EntriesParams entries;
  const void* grad;  // [n, d]
  const void* W;     // [d_sae, d]
  int32_t d;
  void* out;  // like the values, in their format
};

// Launch on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_sparse_decode(const DecodeParams& params, Format format, void* stream);
const char* launch_sparse_decode_values_grad(const ValuesGradParams& params, Format format,
                                             void* stream);

}  // namespace fastsae::cuda
