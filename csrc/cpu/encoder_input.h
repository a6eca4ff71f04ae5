// What the encode ops read, and its pre-activations by the library's GEMM, a bounded chunk of rows
// at a time: the way for few rows, and at the scalar level. The other way is in encode_block.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/huge_pages.h"
#include "encoder_arguments.h"

namespace fastsae::cpu {

// Pre-activations held at once. Every call of the library's GEMM packs all of W_enc again, so few
// large chunks beat many that fit a cache: the selection reads them at memory speed, which is a
// fiftieth of the GEMM's time.
constexpr int64_t kChunkBytes = int64_t{64} << 20;
// Below this many rows that packing costs the GEMM half its rate (measured on 2 cores of Zen 5).
constexpr int64_t kMinChunkRows = 256;

struct EncoderInput : EncoderArguments {
  std::vector<int32_t> latents;  // with a mask: the eligible latents, ascending
  bool masked = false;

  int64_t latent_count() const { return masked ? static_cast<int64_t>(latents.size()) : d_sae; }
};

template <class T>
Tensor masked_rows(const Tensor& t, const std::vector<int32_t>& rows) {
  const int64_t width = t.dim() == 2 ? t.size(1) : 1;
  const int64_t m = static_cast<int64_t>(rows.size());
  Tensor out =
      t.dim() == 2 ? new_empty(t, {m, width}, t.scalar_type()) : new_empty(t, {m}, t.scalar_type());
  const T* from = data_of<T>(t);
  T* to = mutable_data_of<T>(out);
  torch::stable::parallel_for(0, m, 64, [&, from, to](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::memcpy(to + r * width, from + rows[r] * width, sizeof(T) * static_cast<size_t>(width));
    }
  });
  return out;
}

inline EncoderInput encoder_input(const char* op, const Tensor& x, const Tensor& W_enc,
                                  const std::optional<Tensor>& b_enc,
                                  const std::optional<Tensor>& b_dec,
                                  const std::optional<Tensor>& mask, bool bf16_product) {
  EncoderInput in{encoder_arguments(op, x, W_enc, b_enc, b_dec, mask, bf16_product), {}};
  check_same_type(op, "W_enc", W_enc, x.scalar_type());  // here it is rounded where it is read
  if (in.mask) {
    const bool* flag = data_of<bool>(*in.mask);
    for (int64_t f = 0; f < in.d_sae; ++f) {
      if (flag[f]) in.latents.push_back(static_cast<int32_t>(f));
    }
    in.masked = true;
  }
  return in;
}

// Calls f(pre, bias, first, rows) for consecutive chunks of rows: pre [rows, latent_count()]
// without the bias [latent_count()], which may be null.
template <class T, class F>
void for_each_chunk(const EncoderInput& in, F&& f) {
  const int64_t n = in.x.size(0), m = in.latent_count();
  if (n == 0 || m == 0) return;
  Tensor W = in.masked ? masked_rows<T>(in.W_enc, in.latents) : in.W_enc;
  W = torch::stable::transpose(W, 0, 1);
  std::optional<Tensor> b_enc = in.b_enc;
  if (b_enc && in.masked) b_enc = masked_rows<Acc<T>>(*b_enc, in.latents);
  const Acc<T>* bias = b_enc ? data_of<Acc<T>>(*b_enc) : nullptr;
  Tensor centered = in.x;
  if (in.b_dec) centered = torch::stable::subtract(in.x, *in.b_dec);
  const int64_t chunk =
      row_chunks(n, m * static_cast<int64_t>(sizeof(T)), kChunkBytes, kMinChunkRows, 1).rows;
  Tensor buffer = new_empty(in.x, {chunk, m}, in.x.scalar_type());
  prefer_huge_pages(buffer.mutable_data_ptr(), sizeof(T) * static_cast<size_t>(chunk * m));
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t rows = std::min(chunk, n - first);
    Tensor x = centered, out = buffer;
    x = torch::stable::narrow(x, 0, first, rows);
    out = torch::stable::narrow(out, 0, 0, rows);
    mm_out(x, W, out);
    f(data_of<T>(out), bias, first, rows);
  }
}

}  // namespace fastsae::cpu
