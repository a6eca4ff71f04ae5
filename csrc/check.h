// Argument checks of the C++ ring, for those who call torch.ops.fastsae directly.
// One grammar: "<op>: expected <what>, got <what came>"; Python checks the same facts first.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string>

#include "torch.h"

#define FASTSAE_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace fastsae {

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ']';
  return s.str();
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  FASTSAE_CHECK(t.dim() == 2, op, ": expected ", name, " to have 2 dimensions, got ", shape_of(t));
  FASTSAE_CHECK(t.size(1) < (int64_t{1} << 31), op, ": expected ", name,
                " to have fewer than 2^31 columns, got ", shape_of(t));
}

// Rows of entries are int32.
inline void check_rows(const char* op, int64_t n) {
  FASTSAE_CHECK(n < (int64_t{1} << 31), op, ": expected x to have fewer than 2^31 rows, got ", n);
}

inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t size) {
  FASTSAE_CHECK(t.dim() == 1 && t.size(0) == size, op, ": expected ", name, " to be [", size,
                "], got ", shape_of(t));
}

inline void check_same_type(const char* op, const char* name, const Tensor& t, ScalarType type) {
  FASTSAE_CHECK(t.scalar_type() == type, op, ": expected ", name, " to have the dtype of x");
}

inline void check_int32(const char* op, const char* name, const Tensor& t) {
  FASTSAE_CHECK(t.scalar_type() == ScalarType::Int, op, ": expected ", name, " to be int32");
}

inline void check_k(const char* op, int64_t k, int64_t d_sae) {
  FASTSAE_CHECK(k >= 1 && k <= d_sae, op, ": expected 1 <= k <= d_sae = ", d_sae, ", got k = ", k);
}

// Latents are int32, and so are the d_sae + 1 offsets of their lists.
inline void check_d_sae(const char* op, int64_t d_sae) {
  FASTSAE_CHECK(d_sae >= 0, op, ": expected d_sae >= 0, got ", d_sae);
  FASTSAE_CHECK(d_sae < INT32_MAX, op, ": expected d_sae < 2^31 - 1, got ", d_sae);
}

inline void check_entries(const char* op, int64_t entries) {
  FASTSAE_CHECK(entries < (int64_t{1} << 31), op,
                ": expected fewer than 2^31 selected entries, got ", entries);
}

// The entries that a selection from an [n, m] matrix has room for, where the argument `name` asks
// for so many.
inline int64_t selection_capacity(const char* op, const char* name, int64_t asked, int64_t n,
                                  int64_t m) {
  FASTSAE_CHECK(asked >= 0, op, ": expected ", name, " >= 0, got ", asked);
  const int64_t capacity = std::min(asked, n * m);
  check_entries(op, capacity);
  return capacity;
}

// The shapes of sparse activations; their indices and offsets are for whoever can read them.
inline void check_entries_layout(const char* op, const Tensor& values, const Tensor& indices,
                                 const std::optional<Tensor>& offsets) {
  check_int32(op, "indices", indices);
  FASTSAE_CHECK(values.dim() == indices.dim() && values.numel() == indices.numel(), op,
                ": expected indices to have the shape of values, got ", shape_of(indices), " and ",
                shape_of(values));
  if (!offsets) {
    check_matrix(op, "values", values);
  } else {
    FASTSAE_CHECK(values.dim() == 1 && offsets->dim() == 1 && offsets->size(0) >= 1, op,
                  ": expected values to be [capacity] and offsets to be [n + 1], got ",
                  shape_of(values), " and ", shape_of(*offsets));
    check_int32(op, "offsets", *offsets);
  }
  check_entries(op, values.numel());
}

// The matrix whose rows a decoder reads: W_dec, or its copy in bfloat16.
inline const Tensor& decoder_rows(const char* op, const Tensor& W_dec,
                                  const std::optional<Tensor>& bf16_W_dec) {
  if (!bf16_W_dec) return W_dec;
  FASTSAE_CHECK(W_dec.scalar_type() == ScalarType::Float, op,
                ": expected W_dec to be float32 with bf16_W_dec");
  FASTSAE_CHECK(bf16_W_dec->scalar_type() == ScalarType::BFloat16, op,
                ": expected bf16_W_dec to be bfloat16");
  FASTSAE_CHECK(bf16_W_dec->dim() == 2 && bf16_W_dec->size(0) == W_dec.size(0) &&
                    bf16_W_dec->size(1) == W_dec.size(1),
                op, ": expected bf16_W_dec to be ", shape_of(W_dec), " like W_dec, got ",
                shape_of(*bf16_W_dec));
  return *bf16_W_dec;
}

inline void check_lists_layout(const char* op, const Tensor& offsets, const Tensor& rows,
                               const Tensor& slots) {
  check_int32(op, "offsets", offsets);
  check_int32(op, "rows", rows);
  check_int32(op, "slots", slots);
  FASTSAE_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1 && rows.dim() == 1 && slots.dim() == 1 &&
                    rows.size(0) == slots.size(0),
                op, ": expected offsets to be [d_sae + 1] and rows, slots to be [capacity], got ",
                shape_of(offsets), ", ", shape_of(rows), " and ", shape_of(slots));
}

}  // namespace fastsae
