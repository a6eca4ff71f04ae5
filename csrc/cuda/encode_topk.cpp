// encode_topk on CUDA: topk of (x - b_dec) W_enc^T + b_enc on unrounded sums, a chunk of rows at a
// time, a block of rows and latents, or where the product computes them.
#include "cuda/encode_by_score.h"
#include "cuda/encoder_blocks.h"
#include "cuda/encoder_hopper.h"
#include "cuda/row_candidates.h"

namespace fastsae::cuda {
namespace {

struct Selected {
  Tensor values, indices;  // [n, k]

  Selected rows(int64_t first, int64_t count) {
    return {torch::stable::narrow(values, 0, first, count),
            torch::stable::narrow(indices, 0, first, count)};
  }
};

// Whether a block holds the k largest of its rows, and lists of them are worth it.
bool fits_blocks(const EncodePlan& plan, int64_t k, Format format) {
  return plan.way != EncodeWay::kRows && format == Format::kFloat32 && k <= kMostCandidatesTaken &&
         k <= plan.columns;
}

void select_in_blocks(const char* op, const EncoderArguments& in, const EncodePlan& plan,
                      int64_t k_in, bool relu, bool absolute, void* main, Selected& out) {
  const int32_t k = static_cast<int32_t>(k_in), capacity = row_candidates_capacity(k);
  Tensor entries = scratch(in.x, plan.rows * capacity * 8);
  Tensor count = new_empty(in.x, {plan.rows}, ScalarType::Int);
  Tensor bound = new_empty(in.x, {plan.rows}, ScalarType::Float);
  const RowCandidates kept{static_cast<uint64_t*>(entries.mutable_data_ptr()),
                           static_cast<uint32_t*>(count.mutable_data_ptr()),
                           mutable_data_of<float>(bound), capacity};
  for_each_block(op, in, plan, main, [&](const EncodeBlock& block, void* stream) {
    const FilterRowsParams filter{static_cast<const float*>(block.pre),
                                  columns_of<float>(in.b_enc, block),
                                  columns_of<bool>(in.mask, block),
                                  block.rows,
                                  block.pitch,
                                  static_cast<int32_t>(block.columns),
                                  static_cast<int32_t>(block.first_column),
                                  k,
                                  absolute,
                                  kept};
    check_launch(op, launch_filter_rows(filter, stream));
    if (!block.last_of_rows) return;
    Selected some = out.rows(block.first, block.rows);
    const ChooseRowsParams choose{kept,
                                  in.mask ? data_of<bool>(*in.mask) : nullptr,
                                  block.rows,
                                  k,
                                  relu,
                                  mutable_data_of<float>(some.values),
                                  mutable_data_of<int32_t>(some.indices)};
    check_launch(op, launch_choose_rows(choose, stream));
  });
}

void select_in_chunks(const char* op, const EncoderArguments& in, int64_t k, bool relu,
                      Format format, void* stream, Selected& out) {
  for_each_chunk(in, [&](const void* pre, int64_t first, int64_t rows) {
    Selected some = out.rows(first, rows);
    TopkParams params{pre,
                      in.b_enc ? in.b_enc->const_data_ptr() : nullptr,
                      in.mask ? data_of<bool>(*in.mask) : nullptr,
                      rows,
                      static_cast<int32_t>(in.d_sae),
                      static_cast<int32_t>(k),
                      false,
                      relu,
                      some.values.mutable_data_ptr(),
                      mutable_data_of<int32_t>(some.indices)};
    Tensor space = scratch(in.x, topk_scratch(params, format));
    params.scratch = space.mutable_data_ptr();
    check_launch(op, launch_topk(params, format, stream));
  });
}

std::tuple<Tensor, Tensor> encode_topk(const Tensor& x, const Tensor& W_enc,
                                       std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
                                       int64_t k, std::optional<Tensor> mask, bool relu,
                                       bool absolute, bool bf16_product) {
  constexpr const char* op = "encode_topk";
  format_of(op, "x", x);
  const DeviceScope device(x);
  const EncoderArguments in = encoder_input(op, x, W_enc, b_enc, b_dec, mask, bf16_product);
  check_k(op, k, in.d_sae);
  const int64_t n = x.size(0);
  Selected out{new_empty(x, {n, k}, accumulator_type(x)), new_empty(x, {n, k}, ScalarType::Int)};
  const Format format = format_of(op, "x", out.values);
  const EncodePlan plan = encode_plan(n, in.d_sae);
  if (topk_on_hopper(op, in, multiplies_bfloat16(x, bf16_product), k, relu, absolute,
                     device.stream(), out.values, out.indices)) {
    return {torch::stable::to(out.values, x.scalar_type()), out.indices};
  }
  if (fits_blocks(plan, k, format)) {
    select_in_blocks(op, in, plan, k, relu, absolute, device.stream(), out);
  } else if (absolute) {
    Tensor buffer = new_empty(x, {chunks_of(in).rows, in.d_sae}, accumulator_type(x));
    return encode_by_score(op, in, x, k, relu, device.stream(),
                           [&](const void* pre, int64_t, int64_t rows) {
                             const ScoreParams params{latent_rows(in, pre, rows), nullptr, 1.0,
                                                      false, buffer.mutable_data_ptr()};
                             check_launch(op, launch_scores(params, format, device.stream()));
                             return buffer;
                           });
  } else {
    select_in_chunks(op, in, k, relu, format, device.stream(), out);
  }
  return {torch::stable::to(out.values, x.scalar_type()), out.indices};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("encode_topk", TORCH_BOX(&encode_topk));
}

}  // namespace fastsae::cuda
