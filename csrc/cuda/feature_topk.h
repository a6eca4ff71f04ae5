// What the operator feature_topk and the launcher of its first half agree on. No torch, no CUDA.
#pragma once

#include "cuda/format.h"

namespace fastsae::cuda {

struct ColumnBoundParams {
  const void* x;  // [n, columns]
  int64_t n;      // rows, < 2^31
  int32_t columns;
  const int32_t* m;         // [columns] entries to keep; negative counts as 0
  int64_t total;            // about the sum of m; n * columns if nothing is known
  void* lower_bound;        // [columns] in the accumulator's format: larger entries are kept
  int32_t* tie_row;         // [columns]: so are equal ones in rows up to this
  void* scratch = nullptr;  // column_bound_scratch() bytes
};

int64_t column_bound_scratch(const ColumnBoundParams& params, Format format);

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_column_bound(const ColumnBoundParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
