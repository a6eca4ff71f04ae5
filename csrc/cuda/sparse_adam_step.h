// What the operator and the launcher of the CUDA sparse_adam_step_ agree on. No torch, no CUDA.
#pragma once

#include "cuda/entries.h"

namespace fastsae::cuda {

struct AdamConstants {
  double one_minus_beta1, beta2, one_minus_beta2;
  double step_size;            // lr / (1 - beta1^t)
  double inverse_correction2;  // 1 / sqrt(1 - beta2^t)
  double eps;
};

// A parameter and Adam's two averages of it.
struct MovingParams {
  void *p, *m, *v;
};

// float32 or float64 throughout, but for the rows that are gathered.
struct AdamParams {
  MovingParams W_enc, W_dec;  // [d_sae, d]
  MovingParams b_enc, b_dec;  // [d_sae], [d]
  EntriesParams entries;
  const void* grad_values;   // like the values
  const void* error;         // [n, d]
  const void* error_rows;    // [n, d] the same, in bfloat16 if bf16_rows
  const void* centred_rows;  // [n, d], x - b_dec, likewise
  const int32_t* added;      // [added_count] latents with added gradients, or null
  const void* added_W_enc;   // [added_count, d]
  const void* added_W_dec;   // [added_count, d]
  const void* added_b_enc;   // [added_count]
  int32_t added_count;
  int32_t d;
  AdamConstants adam;
  double max_norm;  // infinity does not clip
  bool unit_norm;
  bool bf16_rows;           // takes_bf16_rows() must be true
  void* scratch = nullptr;  // sparse_adam_step_scratch() bytes
};

// Whether the rows that are gathered may be bfloat16: with float32, where all rows can be read 16
// bytes at a time. Theirs are null when this is asked.
bool takes_bf16_rows(const AdamParams& params, Format format);

// Mostly d_sae / 16 rows of d numbers, the shares of the gradient of b_dec, and 2 cap / 256 rows
// for the segments of long lists.
int64_t sparse_adam_step_scratch(const AdamParams& params, Format format);

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_sparse_adam_step(const AdamParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
