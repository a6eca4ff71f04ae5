// What the operators and the launcher of the CUDA topk agree on. No torch, no CUDA.
#pragma once

#include "cuda/format.h"

namespace fastsae::cuda {

struct TopkParams {
  const void* x;            // [n, m]
  const void* bias;         // [m] in the accumulator's format, added to every row, or null
  const bool* mask;         // [m]: others count as -inf and give the value 0; or null
  int64_t n;                // rows
  int32_t m;                // columns
  int32_t k;                // 1 <= k <= m
  bool sorted;              // descending value instead of ascending index
  bool relu;                // selected negative values become 0
  void* values;             // [n, k]
  int32_t* indices;         // [n, k]
  void* scratch = nullptr;  // topk_scratch() bytes
};

// bias and mask need float32 or float64.
int64_t topk_scratch(const TopkParams& params, Format format);

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_topk(const TopkParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
