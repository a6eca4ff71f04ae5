// The linear part of the encoder, a bounded chunk of rows at a time, and the checks that the three
// encode ops share.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/huge_pages.h"
#include "dispatch.h"
#include "torch.h"

namespace fastsae::cpu {

// Pre-activations held at once. Every call of the library's GEMM packs all of W_enc again, so few
// large chunks beat many that fit a cache: the selection reads them at memory speed, which is a
// fiftieth of the GEMM's time.
constexpr int64_t kChunkBytes = int64_t{128} << 20;
// Below this many rows that packing costs the GEMM half its rate (measured on 2 cores of Zen 5).
constexpr int64_t kMinChunkRows = 256;

struct EncoderInput {
  Tensor x;                      // [n, d], b_dec subtracted
  Tensor W_enc;                  // [F, d], or the rows where the mask is true
  std::optional<Tensor> b_enc;   // [F] in the accumulator dtype, likewise
  std::vector<int32_t> latents;  // with a mask: the latent of each row of W_enc, ascending
  bool masked = false;
  int64_t d_sae = 0;
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
                                  const std::optional<Tensor>& mask) {
  check_matrix(op, "x", x);
  check_matrix(op, "W_enc", W_enc);
  FASTSAE_CHECK(x.size(1) == W_enc.size(1), op,
                ": expected x to be [n, d_in] with d_in = ", W_enc.size(1), ", got ", shape_of(x));
  check_same_type(op, "W_enc", W_enc, x.scalar_type());
  EncoderInput in;
  in.d_sae = W_enc.size(0);
  in.x = as_contiguous(x);
  in.W_enc = as_contiguous(W_enc);
  if (b_dec) {
    check_vector(op, "b_dec", *b_dec, x.size(1));
    check_same_type(op, "b_dec", *b_dec, x.scalar_type());
    in.x = torch::stable::subtract(in.x, *b_dec);
  }
  if (b_enc) {
    check_vector(op, "b_enc", *b_enc, in.d_sae);
    check_same_type(op, "b_enc", *b_enc, x.scalar_type());
    in.b_enc = as_contiguous(torch::stable::to(*b_enc, accumulator_type(x)));
  }
  if (mask) {
    check_vector(op, "mask", *mask, in.d_sae);
    FASTSAE_CHECK(mask->scalar_type() == ScalarType::Bool, op, ": expected mask to be bool");
    const Tensor flags = as_contiguous(*mask);
    const bool* flag = data_of<bool>(flags);
    for (int64_t f = 0; f < in.d_sae; ++f) {
      if (flag[f]) in.latents.push_back(static_cast<int32_t>(f));
    }
    in.masked = true;
    in.W_enc = dispatch_floating(op, "x", x, [&](auto type) {
      return masked_rows<typename decltype(type)::type>(in.W_enc, in.latents);
    });
    if (in.b_enc) {
      in.b_enc = accumulator_type(x) == ScalarType::Double
                     ? masked_rows<double>(*in.b_enc, in.latents)
                     : masked_rows<float>(*in.b_enc, in.latents);
    }
  }
  return in;
}

// Calls f(pre, bias, first, rows) for consecutive chunks of rows, pre [rows, W_enc.size(0)] without
// the bias.
template <class T, class F>
void for_each_chunk(const EncoderInput& in, F&& f) {
  const int64_t n = in.x.size(0), m = in.W_enc.size(0);
  if (n == 0 || m == 0) return;
  const int64_t fitting =
      std::max(kMinChunkRows, kChunkBytes / (m * static_cast<int64_t>(sizeof(T))));
  const int64_t chunks = (n + fitting - 1) / fitting;
  const int64_t chunk = (n + chunks - 1) / chunks;  // equal chunks: no small one at the end
  Tensor buffer = new_empty(in.x, {chunk, m}, in.x.scalar_type());
  prefer_huge_pages(buffer.mutable_data_ptr(), sizeof(T) * static_cast<size_t>(chunk * m));
  const Tensor W = torch::stable::transpose(in.W_enc, 0, 1);
  const Acc<T>* bias = in.b_enc ? data_of<Acc<T>>(*in.b_enc) : nullptr;
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t rows = std::min(chunk, n - first);
    Tensor x = in.x, out = buffer;
    x = torch::stable::narrow(x, 0, first, rows);
    out = torch::stable::narrow(out, 0, 0, rows);
    mm_out(x, W, out);
    f(data_of<T>(out), bias, first, rows);
  }
}

}  // namespace fastsae::cpu
