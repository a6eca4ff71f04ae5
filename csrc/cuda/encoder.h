// The pre-activations of the encode ops on CUDA: the library's GEMM, a bounded chunk of rows at a
// time, in the accumulator's format. The bias is added, and the mask applied, where they are read.
#pragma once

#include <algorithm>

#include "cuda/stream.h"
#include "encoder_arguments.h"

namespace fastsae::cuda {

// Pre-activations held at once, and rows that keep the GEMM efficient however long they are. Few
// in the emulation, so that there are several chunks.
#ifdef FASTSAE_EMULATED
constexpr int64_t kChunkBytes = 1 << 16, kMinChunkRows = 8;
#else
constexpr int64_t kChunkBytes = int64_t{1} << 30, kMinChunkRows = 256;
#endif

inline EncoderArguments encoder_input(const char* op, const Tensor& x, const Tensor& W_enc,
                                      const std::optional<Tensor>& b_enc,
                                      const std::optional<Tensor>& b_dec,
                                      const std::optional<Tensor>& mask, bool bf16_product) {
  check_device(op, "W_enc", W_enc, x);
  if (b_enc) check_device(op, "b_enc", *b_enc, x);
  if (b_dec) check_device(op, "b_dec", *b_dec, x);
  if (mask) check_device(op, "mask", *mask, x);
  EncoderArguments in = encoder_arguments(op, x, W_enc, b_enc, b_dec, mask, bf16_product);
  check_rows(op, in.x.size(0));
  // The factors as they are multiplied. A difference of 16-bit numbers is rounded once.
  if (in.b_dec) in.x = torch::stable::subtract(in.x, *in.b_dec);
  if (bf16_product && x.scalar_type() == ScalarType::Float) {
    in.x = torch::stable::to(in.x, ScalarType::BFloat16);
    in.W_enc = torch::stable::to(in.W_enc, ScalarType::BFloat16);
  }
#ifdef FASTSAE_EMULATED  // the host's GEMM has no float32 sums of 16-bit factors
  in.x = torch::stable::to(in.x, accumulator_type(x));
  in.W_enc = torch::stable::to(in.W_enc, accumulator_type(x));
#endif
  return in;
}

inline RowChunks chunks_of(const EncoderArguments& in) {
  return row_chunks(in.x.size(0), 4 * in.d_sae, kChunkBytes, kMinChunkRows, 8);
}

// out [rows, columns] = the pre-activations of rows first, first + 1, ... and latents first_column,
// first_column + 1, ... without the bias.
inline void multiply(const EncoderArguments& in, int64_t first, int64_t rows, int64_t first_column,
                     int64_t columns, Tensor& out) {
  Tensor x = in.x, W = in.W_enc;
  x = torch::stable::narrow(x, 0, first, rows);
  if (columns < in.d_sae) W = torch::stable::narrow(W, 0, first_column, columns);
  W = torch::stable::transpose(W, 0, 1);
  if (x.scalar_type() == out.scalar_type()) mm_out(x, W, out);
  else mm_widening_out(x, W, out);
}

// Calls f(pre [rows, F] without the bias, first, rows) for consecutive chunks of rows.
template <class Call>
void for_each_chunk(const EncoderArguments& in, Call&& f) {
  const int64_t n = in.x.size(0);
  const RowChunks chunks = chunks_of(in);
  const Tensor buffer = new_empty(in.x, {chunks.rows, in.d_sae}, accumulator_type(in.x));
  for (int64_t first = 0; first < n; first += chunks.rows) {
    const int64_t rows = std::min(chunks.rows, n - first);
    Tensor out = buffer;
    out = torch::stable::narrow(out, 0, 0, rows);
    multiply(in, first, rows, 0, in.d_sae, out);
    f(out.const_data_ptr(), first, rows);
  }
}

}  // namespace fastsae::cuda
