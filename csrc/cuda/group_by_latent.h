// What the operators and the launcher of the CUDA group_by_latent agree on. No torch, no CUDA.
#pragma once

#include "cuda/sparse_acts.h"

namespace fastsae::cuda {

struct GroupByLatentParams {
  SparseActsParams entries;  // values in any format
  int32_t* offsets;          // [d_sae + 1]
  int32_t* rows;             // [capacity]
  int32_t* slots;            // [capacity]
  void* scratch = nullptr;   // group_by_latent_scratch() bytes
};

int64_t group_by_latent_scratch(const SparseActsParams& entries);

// `format` is that of the values. Launches on `stream` (a cudaStream_t); null when all is well,
// else the CUDA error's text.
const char* launch_group_by_latent(const GroupByLatentParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
