// What the encode ops and the launchers agree on that do more to a row of pre-activations than
// topk: scores to select by, the entries that were selected, the largest of groups. No torch, no
// CUDA.
#pragma once

#include "cuda/format.h"

namespace fastsae::cuda {

// Pre-activations z = x + bias, in the accumulator's format.
struct LatentRows {
  const void* x;     // [n, m]
  const void* bias;  // [m] or null
  const bool* mask;  // [m]: others never win and have the value 0; or null
  int64_t n;
  int32_t m;
};

// scores [n, m] = |z|, or relu(z) (base + |effect|). base is 1 / beta, and if `normalize` times the
// mean of |effect| in the row, 1 where that is 0.
struct ScoreParams {
  LatentRows rows;
  const void* effect;  // [n, m] or null; may be `scores`
  double beta;
  bool normalize;
  void* scores;
};

// values [n, k] = z, or relu(z), at `indices` [n, k].
struct PickParams {
  LatentRows rows;
  const int32_t* indices;
  int32_t k;
  bool relu;
  void* values;
};

// values, indices [n, k] = relu of the largest z of each of k equal groups of columns.
struct GroupMaxParams {
  LatentRows rows;
  int32_t k;
  void* values;
  int32_t* indices;
};

// float32 and float64. On `stream` (a cudaStream_t); null when all is well, else the CUDA error's
// text.
const char* launch_scores(const ScoreParams& params, Format format, void* stream);
const char* launch_pick(const PickParams& params, Format format, void* stream);
const char* launch_group_max(const GroupMaxParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
