// What the operator and the launcher of the CUDA sparse_weight_grad agree on. No torch, no CUDA.
#pragma once

#include "cuda/lists.h"

namespace fastsae::cuda {

struct WeightGradParams {
  ListsParams lists;
  const void* x;  // [n, d]
  int32_t d;
  void* weight;             // [d_sae, d]
  void* bias;               // [d_sae]
  void* scratch = nullptr;  // sparse_weight_grad_scratch() bytes
};

// At most capacity / kSegment rows of d numbers in the accumulator's format, rounded up to whole
// strips.
int64_t sparse_weight_grad_scratch(const WeightGradParams& params, Format format);

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_sparse_weight_grad(const WeightGradParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
