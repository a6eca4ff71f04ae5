// out[n, d] = sum_j values[n, j] W_dec[indices[n, j]] + b_dec.
// Threads own tokens; the rows of W_dec are gathered, k rows of d per token: that is the cost.
#include "cpu/active_row.h"
#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

Tensor sparse_decode(const Tensor& values, const Tensor& indices, std::optional<Tensor> offsets,
                     const Tensor& W, std::optional<Tensor> b_dec,
                     std::optional<Tensor> bf16_W_dec) {
  constexpr const char* op = "sparse_decode";
  check_matrix(op, "W_dec", W);
  const Tensor rows = as_contiguous(decoder_rows(op, W, bf16_W_dec));
  const int64_t d = W.size(1);
  const SparseActsArgs e =
      checked_sparse_acts(op, accumulated(op, values, W), indices, offsets, W.size(0));
  const std::optional<Tensor> bias = decoder_bias(op, b_dec, W);
  Tensor out = new_empty(W, {e.n, d}, W.scalar_type());
  dispatch_decoder(op, rows, W, [&](auto row_type, auto type) {
    using R = typename decltype(row_type)::type;
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const auto gather_sum = gather_sum_of<R, T>();
    const A* value = data_of<A>(e.values);
    const R* from = data_of<R>(rows);
    const T* shift = bias ? data_of<T>(*bias) : nullptr;
    T* to = mutable_data_of<T>(out);
    const bool ahead = fetches_ahead(rows);
    torch::stable::parallel_for(0, e.n, 8, [&](int64_t begin, int64_t end) {
      thread_local ActiveRow<A> active;
      for (int64_t row = begin; row < end; ++row) {
        active.read(e, value, row);
        gather_sum(active.weights, active.indices, active.count, ahead ? active.listed : 0, from, d,
                   shift, to + row * d);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
}

}  // namespace fastsae::cpu
