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
  ParameterParams W_enc, W_dec;  // [d_sae, d_in], [d_sae, d_out]
  ParameterParams b_enc, b_dec;  // [d_sae], [d_out]
  SparseActsParams dec_entries;  // of n rows, the decoder's
  SparseActsParams enc_entries;  // values: the gradient of each; unless own_entries, the same ones
  bool own_entries;              // the encoder's entries are others, of rows of their own
  const void* grad_output;       // [n, d_out]
  const void* grad_rows;         // [n, d_out] the same, in bfloat16 if bf16_rows
  const void* centered_rows;     // [n of the encoder, d_in], x - b_dec or x, likewise
  const int32_t* extra_latents;  // [extra_count] latents with more gradients, or null
  const void* extra_W_enc;       // [extra_count, d_in]
  const void* extra_W_dec;       // [extra_count, d_out]
  const void* extra_b_enc;       // [extra_count]
  int32_t extra_count;
  const void* grad_W_enc;  // [d_sae, d_in] more of its gradient, or null
  const void* grad_W_dec;  // [d_sae, d_out] likewise
  const void* grad_b_enc;  // [d_sae] likewise
  const void* grad_b_dec;  // [d_out] in place of the sum of grad_output, or null
  double* clip;            // [2] squared norm of other gradients, and the factor found; or null
  int32_t d_in, d_out;
  double lr, beta1, beta2;
  int64_t step;
  const double* lr_at;     // [] in place of lr, or null
  const int64_t* step_at;  // [] in place of step, or null; below 1 nothing is updated
  AdamSettings<double> adam;
  double max_norm;  // infinity does not clip
  bool unit_norm;
  bool apply_b_dec;         // b_dec is subtracted from x, so that it gets shares of the encoder's
  bool by_rows;             // Adam-mini: v of W_enc and W_dec is [d_sae]
  bool bf16_averages;       // m and v of W_enc and W_dec, of float32, rounded stochastically
  int64_t rounding_seed;    // of that
  bool bf16_rows;           // takes_bf16_rows() must be true
  uint16_t* bf16_W_enc;     // [d_sae, d_in] gets the new W_enc in bfloat16, of float32; or null
  uint16_t* bf16_W_dec;     // [d_sae, d_out] likewise
  void* scratch = nullptr;  // sparse_adam_step_scratch() bytes

  // Whether encoder and decoder differ in more than their numbers: kernels of another file.
  bool by_side() const { return own_entries || d_in != d_out || grad_W_enc || grad_W_dec; }
};

// Whether the rows that are gathered may be bfloat16: with float32, where all rows can be read 16
// bytes at a time. Theirs are null when this is asked.
bool takes_bf16_rows(const AdamParams& params, Format format);

// Mostly d_sae / 16 rows of d_in numbers, the shares of the gradient of b_dec, and capacity / 256
// rows for the segments of long lists, of both codes.
int64_t sparse_adam_step_scratch(const AdamParams& params, Format format);

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_sparse_adam_step(const AdamParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
