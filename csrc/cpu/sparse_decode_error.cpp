// sparse_decode, its error, and the products of the error with the rows of W_dec, token by token.
// Threads own tokens; the k rows of d that a token gathers are read a second time from the cache
// that the sum has brought them into.
#include <tuple>
#include <type_traits>

#include "cpu/active_row.h"
#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

using Found = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// error = x - target in the type of sums; returns the sum of its squares. `space` [d] is scratch.
template <class T, class A>
A subtract(const T* x, const T* target, int64_t d, A* error, A* space) {
  kernels<T>().widen_row(x, d, error);
  kernels<T>().widen_row(target, d, space);
  for (int64_t c = 0; c < d; ++c) error[c] -= space[c];
  return adam_kernels<A>().row_dot(error, error, d);
}

// The error in the type of W_dec, as products take it. `space` [d] is scratch.
template <class T, class A>
const T* as_row(const A* error, int64_t d, T* space) {
  if constexpr (std::is_same_v<T, A>) return error;
  for (int64_t c = 0; c < d; ++c) space[c] = narrow<T>(error[c]);
  return space;
}

Found sparse_decode_error(const Tensor& values, const Tensor& indices,
                          std::optional<Tensor> offsets, const Tensor& W,
                          std::optional<Tensor> b_dec, const Tensor& target_in,
                          std::optional<Tensor> bf16_W_dec) {
  constexpr const char* op = "sparse_decode_error";
  check_matrix(op, "W_dec", W);
  const Tensor rows = as_contiguous(decoder_rows(op, W, bf16_W_dec));
  const Tensor target = as_contiguous(target_in);
  const int64_t d = W.size(1);
  const SparseActsArgs e =
      checked_sparse_acts(op, accumulated(op, values, W), indices, offsets, W.size(0));
  const std::optional<Tensor> bias = decoder_bias(op, b_dec, W);
  FASTSAE_CHECK(target.dim() == 2 && target.size(0) == e.n && target.size(1) == d, op,
                ": expected target to be [", e.n, ", ", d, "], got ", shape_of(target));
  FASTSAE_CHECK(target.scalar_type() == W.scalar_type(), op,
                ": expected target to have the dtype of W_dec");
  const ScalarType sums = accumulator_type(W);
  Tensor out = new_empty(W, {e.n, d}, W.scalar_type()), error = new_empty(W, {e.n, d}, sums);
  Tensor squared = new_empty(W, {e.n}, sums), products = torch::stable::empty_like(e.values);
  dispatch_decoder(op, rows, W, [&](auto row_type, auto type) {
    using R = typename decltype(row_type)::type;
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const auto gather_sum = gather_sum_of<R, T>();
    const auto gather_dot = gather_dot_of<R, T>();
    const A* value = data_of<A>(e.values);
    const R* from = data_of<R>(rows);
    const T* wanted = data_of<T>(target);
    const T* shift = bias ? data_of<T>(*bias) : nullptr;
    T* to = mutable_data_of<T>(out);
    A *missed = mutable_data_of<A>(error), *sum = mutable_data_of<A>(squared);
    A* product = mutable_data_of<A>(products);
    std::fill(product + e.total, product + e.values.numel(), A(0));
    const bool ahead = fetches_ahead(rows);
    torch::stable::parallel_for(0, e.n, 8, [&](int64_t begin, int64_t end) {
      thread_local ActiveRow<A> active;
      thread_local std::vector<A> space, found;
      thread_local std::vector<T> row_space;
      space.resize(static_cast<size_t>(d));
      row_space.resize(static_cast<size_t>(d));
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * d;
        active.read(e, value, row);
        gather_sum(active.weights, active.indices, active.count, ahead ? active.listed : 0, from, d,
                   shift, to + at);
        sum[row] = subtract(to + at, wanted + at, d, missed + at, space.data());
        found.resize(static_cast<size_t>(active.count));
        gather_dot(as_row<T>(missed + at, d, row_space.data()), active.indices, active.count, from,
                   d, found.data());
        int64_t next = 0;
        for (int64_t j = e.begin(row); j < e.end(row); ++j) {
          product[j] = value[j] == A(0) ? A(0) : found[next++];
        }
      }
    });
  });
  return {out, error, squared, products};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_decode_error", TORCH_BOX(&sparse_decode_error));
}

}  // namespace fastsae::cpu
