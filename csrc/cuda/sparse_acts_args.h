// Arguments that the sparse operators on CUDA share. What only the device knows, that indices and
// offsets are in range, is not checked: it would wait for the device. Entries out of range are
// ignored, so nothing is read out of bounds.
#pragma once

#include <algorithm>

#include "check.h"
#include "cuda/sparse_acts.h"
#include "cuda/stream.h"

namespace fastsae::cuda {

// Contiguous, and alive as long as the parameters are in use.
struct SparseActsArgs {
  Tensor values, indices;
  std::optional<Tensor> offsets;
  SparseActsParams params;
};

// Whether values are read in the format of the sums instead of their matrix's.
inline bool is_wide(const Tensor& values, ScalarType matrix) {
  return values.scalar_type() != matrix || matrix == ScalarType::Float ||
         matrix == ScalarType::Double;
}

// `like`: a tensor of the device, which errors call by `like_name`.
inline SparseActsArgs checked_sparse_acts(const char* op, const Tensor& values,
                                          const Tensor& indices,
                                          const std::optional<Tensor>& offsets, int64_t d_sae,
                                          ScalarType matrix, const char* like_name,
                                          const Tensor& like) {
  check_entries_layout(op, values, indices, offsets);
  check_device(op, "values", values, like, like_name);
  check_device(op, "indices", indices, like, like_name);
  if (offsets) check_device(op, "offsets", *offsets, like, like_name);
  SparseActsArgs e{as_contiguous(values), as_contiguous(indices), std::nullopt, {}};
  if (offsets) e.offsets = as_contiguous(*offsets);
  e.params = {e.values.const_data_ptr(),
              is_wide(values, matrix),
              data_of<int32_t>(e.indices),
              e.offsets ? data_of<int32_t>(*e.offsets) : nullptr,
              offsets ? offsets->size(0) - 1 : values.size(0),
              offsets ? 0 : static_cast<int32_t>(values.size(1)),
              static_cast<int32_t>(values.numel()),
              static_cast<int32_t>(std::min<int64_t>(d_sae, INT32_MAX))};
  return e;
}

inline void check_decoder_bias(const char* op, const std::optional<Tensor>& b_dec,
                               const Tensor& W) {
  if (!b_dec) return;
  check_vector(op, "b_dec", *b_dec, W.size(1));
  FASTSAE_CHECK(b_dec->scalar_type() == W.scalar_type(), op,
                ": expected b_dec to have the dtype of W_dec");
  check_device(op, "b_dec", *b_dec, W, "W_dec");
}

// The matrix whose rows a decoder reads, on the device of W_dec.
inline const Tensor& checked_decoder_rows(const char* op, const Tensor& W_dec,
                                          const std::optional<Tensor>& bf16_W_dec) {
  if (bf16_W_dec) check_device(op, "bf16_W_dec", *bf16_W_dec, W_dec, "W_dec");
  return decoder_rows(op, W_dec, bf16_W_dec);
}

// Values come in the dtype of the matrix they multiply, or in the dtype of its sums.
inline void check_values_type(const char* op, const Tensor& values, const char* name,
                              const Tensor& matrix) {
  FASTSAE_CHECK(values.scalar_type() == matrix.scalar_type() ||
                    values.scalar_type() == accumulator_type(matrix),
                op, ": expected values to have the dtype of ", name, " or of its accumulator");
}

}  // namespace fastsae::cuda
