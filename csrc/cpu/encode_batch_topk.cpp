// Matrix-wide selection of (x - b_dec) W_enc^T + b_enc in the variable layout: the `budget` largest
// positive entries, or those above theta. Exact, though the matrix is met a chunk at a time.
#include "cpu/encode_chunks.h"
#include "cpu/matrix_select.h"

namespace fastsae::cpu {
namespace {

struct Selection {
  Tensor values, indices, offsets, threshold;
};

template <class T>
Selection select(const EncoderInput& in, int64_t cap, const Acc<T>* theta, bool per_column) {
  using A = Acc<T>;
  const int64_t n = in.x.size(0);
  Selection out{new_empty(in.x, {cap}, in.x.scalar_type()), new_empty(in.x, {cap}, ScalarType::Int),
                new_empty(in.x, {n + 1}, ScalarType::Int),
                new_empty(in.x, {}, scalar_type_of<A>())};
  MatrixSelect<A> selected(n, in.W_enc.size(0), cap, theta, per_column);
  for_each_chunk<T>(in, [&](const T* pre, const A* bias, int64_t first, int64_t rows) {
    selected.add(pre, bias, first, rows);
  });
  int32_t* indices = mutable_data_of<int32_t>(out.indices);
  int32_t* offsets = mutable_data_of<int32_t>(out.offsets);
  *mutable_data_of<A>(out.threshold) =
      selected.finish(mutable_data_of<T>(out.values), indices, offsets, cap);
  if (in.masked) {
    for (int32_t j = 0; j < offsets[n]; ++j) indices[j] = in.latents[indices[j]];
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_batch_topk(const Tensor& x, const Tensor& W_enc,
                                                             std::optional<Tensor> b_enc,
                                                             std::optional<Tensor> b_dec,
                                                             int64_t budget,
                                                             std::optional<Tensor> mask) {
  constexpr const char* op = "encode_batch_topk";
  const EncoderInput in = encoder_input(op, x, W_enc, b_enc, b_dec, mask);
  FASTSAE_CHECK(budget >= 0, op, ": expected budget >= 0, got ", budget);
  const int64_t cap = std::min(budget, in.x.size(0) * in.d_sae);
  check_entries(op, cap);
  const Selection s = dispatch_floating(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    const Acc<T> zero = 0;
    return select<T>(in, cap, &zero, false);
  });
  return {s.values, s.indices, s.offsets, s.threshold};
}

std::tuple<Tensor, Tensor, Tensor> encode_threshold(const Tensor& x, const Tensor& W_enc,
                                                    std::optional<Tensor> b_enc,
                                                    std::optional<Tensor> b_dec,
                                                    const Tensor& theta_in, int64_t cap_in) {
  constexpr const char* op = "encode_threshold";
  const EncoderInput in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt);
  const Tensor theta = as_contiguous(theta_in);
  if (theta.dim() != 0) check_vector(op, "theta", theta, in.d_sae);
  FASTSAE_CHECK(theta.scalar_type() == accumulator_type(x), op,
                ": expected theta to be float32 (float64 for a float64 x)");
  FASTSAE_CHECK(cap_in >= 0, op, ": expected cap >= 0, got ", cap_in);
  const int64_t cap = std::min(cap_in, in.x.size(0) * in.d_sae);
  check_entries(op, cap);
  const Selection s = dispatch_floating(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    return select<T>(in, cap, data_of<Acc<T>>(theta), theta.dim() != 0);
  });
  return {s.values, s.indices, s.offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("encode_batch_topk", TORCH_BOX(&encode_batch_topk));
  m.impl("encode_threshold", TORCH_BOX(&encode_threshold));
}

}  // namespace fastsae::cpu
