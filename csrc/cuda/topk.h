// What the operator and the launcher of the CUDA topk agree on. No torch, no CUDA.
#pragma once

#include "cuda/format.h"

namespace fastsae::cuda {

struct TopkParams {
  const void* x;         // [n, m]
  int64_t n;             // rows
  int32_t m;             // columns
  int32_t k;             // 1 <= k <= m
  bool sorted;           // descending value instead of ascending index
  void* values;          // [n, k]
  int32_t* indices;      // [n, k]
  uint64_t* sort_space;  // [n, 2 * next power of two of k], only if sorted
};

int32_t next_power_of_two(int32_t k);

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_topk(const TopkParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
