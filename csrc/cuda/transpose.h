// What the operators and the launcher of the CUDA transpose agree on. No torch, no CUDA.
#pragma once

#include "cuda/entries.h"

namespace fastsae::cuda {

struct TransposeParams {
  EntriesParams entries;    // values in any format
  int32_t* offsets;         // [d_sae + 1]
  int32_t* rows;            // [cap]
  int32_t* slots;           // [cap]
  void* scratch = nullptr;  // transpose_scratch() bytes
};

int64_t transpose_scratch(const EntriesParams& entries);

// `format` is that of the values. Launches on `stream` (a cudaStream_t); null when all is well,
// else the CUDA error's text.
const char* launch_transpose(const TransposeParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
