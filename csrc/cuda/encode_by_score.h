// topk of rows of pre-activations by a score that is not their value.
#pragma once

#include "cuda/encoder.h"
#include "cuda/latent_rows.h"
#include "cuda/topk.h"

namespace fastsae::cuda {

// A chunk of rows of pre-activations.
inline LatentRows latent_rows(const EncoderArguments& in, const void* pre, int64_t rows) {
  return {pre, in.b_enc ? in.b_enc->const_data_ptr() : nullptr,
          in.mask ? data_of<bool>(*in.mask) : nullptr, rows, static_cast<int32_t>(in.d_sae)};
}

// values, indices [n, k]: of each row the entries z where the score is among the k largest, or
// relu(z). score(pre, first, rows) computes those of a chunk and returns them, [rows, d_sae].
template <class Score>
std::tuple<Tensor, Tensor> encode_by_score(const char* op, const EncoderArguments& in,
                                           const Tensor& x, int64_t k, bool relu, void* stream,
                                           Score&& score) {
  const int64_t n = x.size(0);
  Tensor values = new_empty(x, {n, k}, accumulator_type(x));
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  const Format format = format_of(op, "x", values);
  for_each_chunk(in, [&](const void* pre, int64_t first, int64_t rows) {
    const Tensor scores = score(pre, first, rows);
    Tensor some_values = values, some_indices = indices;
    some_values = torch::stable::narrow(some_values, 0, first, rows);
    some_indices = torch::stable::narrow(some_indices, 0, first, rows);
    int32_t* chosen = mutable_data_of<int32_t>(some_indices);
    const int32_t count = static_cast<int32_t>(k);
    TopkParams params{scores.const_data_ptr(),        nullptr, nullptr, rows,
                      static_cast<int32_t>(in.d_sae), count,   false,   false,
                      some_values.mutable_data_ptr(), chosen};
    Tensor space = scratch(x, topk_scratch(params, format));
    params.scratch = space.mutable_data_ptr();
    check_launch(op, launch_topk(params, format, stream));
    const PickParams pick{latent_rows(in, pre, rows), chosen, count, relu,
                          some_values.mutable_data_ptr()};
    check_launch(op, launch_pick(pick, format, stream));
  });
  return {torch::stable::to(values, x.scalar_type()), indices};
}

}  // namespace fastsae::cuda
