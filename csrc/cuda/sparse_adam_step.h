// What the operator and the launcher of the CUDA sparse_adam_step_ agree on. No torch, no CUDA.
#pragma once

#include "adam_constants.h"
#include "cuda/sparse_acts.h"

namespace fastsae::cuda {

// A parameter and Adam's two averages of it.
struct ParameterParams {
  void *p, *m, *v;
};

// float32 or float64 throughout, but for the rows that are gathered.
struct AdamParams {
  ParameterParams W_enc, W_dec;  // [d_sae, d]
  ParameterParams b_enc, b_dec;  // [d_sae], [d]
  SparseActsParams entries;
  const void* grad_values;       // like the values
  const void* grad_output;       // [n, d]
  const void* grad_rows;         // [n, d] the same, in bfloat16 if bf16_rows
  const void* centered_rows;     // [n, d], x - b_dec, likewise
  const int32_t* extra_latents;  // [extra_count] latents with more gradients, or null
  const void* extra_W_enc;       // [extra_count, d]
  const void* extra_W_dec;       // [extra_count, d]
  const void* extra_b_enc;       // [extra_count]
  int32_t extra_count;
  const void* grad_b_enc;  // [d_sae] more of its gradient, or null
  const void* grad_b_dec;  // [d] in place of the sum of grad_output, or null
  double* clip;            // [2] squared norm of other gradients, and the factor found; or null
  int32_t d;
  AdamConstants<double> adam;
  double max_norm;  // infinity does not clip
  bool unit_norm;
  bool apply_b_dec;         // b_dec is subtracted from x, so that it gets shares of the encoder's
  bool by_rows;             // Adam-mini: v of W_enc and W_dec is [d_sae]
  bool bf16_rows;           // takes_bf16_rows() must be true
  void* scratch = nullptr;  // sparse_adam_step_scratch() bytes
};

// Whether the rows that are gathered may be bfloat16: with float32, where all rows can be read 16
// bytes at a time. Theirs are null when this is asked.
bool takes_bf16_rows(const AdamParams& params, Format format);

// Mostly d_sae / 16 rows of d numbers, the shares of the gradient of b_dec, and 2 capacity / 256
// rows for the segments of long lists.
int64_t sparse_adam_step_scratch(const AdamParams& params, Format format);

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_sparse_adam_step(const AdamParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
