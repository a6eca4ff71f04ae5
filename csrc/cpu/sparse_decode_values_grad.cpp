// The gradient of sparse_decode in values: <grad[n], W_dec[indices[n, j]]>, 0 for inactive entries.
// Threads own tokens; the rows of W_dec are gathered, k rows of d per token: that is the cost.
#include "cpu/active_row.h"
#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

Tensor sparse_decode_values_grad(const Tensor& grad_in, const Tensor& values, const Tensor& indices,
                                 std::optional<Tensor> offsets, const Tensor& W,
                                 std::optional<Tensor> bf16_W_dec) {
  constexpr const char* op = "sparse_decode_values_grad";
  check_matrix(op, "W_dec", W);
  const Tensor rows = as_contiguous(decoder_rows(op, W, bf16_W_dec));
  const Tensor grad = as_contiguous(grad_in);
  const int64_t d = W.size(1);
  const SparseActsArgs e =
      checked_sparse_acts(op, accumulated(op, values, W), indices, offsets, W.size(0));
  FASTSAE_CHECK(grad.dim() == 2 && grad.size(0) == e.n && grad.size(1) == d, op,
                ": expected grad to be [", e.n, ", ", d, "], got ", shape_of(grad));
  FASTSAE_CHECK(grad.scalar_type() == W.scalar_type(), op,
                ": expected grad to have the dtype of W_dec");
  Tensor out = torch::stable::empty_like(e.values);
  dispatch_decoder(op, rows, W, [&](auto row_type, auto type) {
    using R = typename decltype(row_type)::type;
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const auto gather_dot = gather_dot_of<R, T>();
    const A* value = data_of<A>(e.values);
    const R* row_of = data_of<R>(rows);
    const T* from = data_of<T>(grad);
    A* to = mutable_data_of<A>(out);
    std::fill(to + e.total, to + e.values.numel(), A(0));
    torch::stable::parallel_for(0, e.n, 8, [&](int64_t begin, int64_t end) {
      thread_local ActiveRow<A> active;
      thread_local std::vector<A> products;
      for (int64_t row = begin; row < end; ++row) {
        active.read(e, value, row);
        products.resize(static_cast<size_t>(active.count));
        gather_dot(from + row * d, active.indices, active.count, row_of, d, products.data());
        int64_t next = 0;
        for (int64_t j = e.begin(row); j < e.end(row); ++j) {
          to[j] = value[j] == A(0) ? A(0) : products[next++];
        }
      }
    });
  });
  return torch::stable::to(out, values.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_decode_values_grad", TORCH_BOX(&sparse_decode_values_grad));
}

}  // namespace fastsae::cpu
