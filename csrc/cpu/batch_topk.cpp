// Matrix-wide selections of x [n, F] in the variable layout: the `budget` largest positive entries,
// or the entries above theta. Threads own groups of rows; the result does not depend on them.
#include "check.h"
#include "cpu/matrix_select.h"
#include "dispatch.h"
#include "torch.h"

namespace fastsae::cpu {
namespace {

struct Selection {
  Tensor values, indices, offsets, threshold;
};

template <class T>
Selection select(const Tensor& x, int64_t cap, const Acc<T>* theta, bool per_column,
                 const Acc<T>* hint) {
  using A = Acc<T>;
  const int64_t n = x.size(0), m = x.size(1);
  Selection out{new_empty(x, {cap}, x.scalar_type()), new_empty(x, {cap}, ScalarType::Int),
                new_empty(x, {n + 1}, ScalarType::Int), new_empty(x, {}, scalar_type_of<A>())};
  MatrixSelect<A> selected(n, m, cap, theta, per_column);
  if (hint) selected.expect(*hint);
  selected.add(data_of<T>(x), static_cast<const A*>(nullptr), 0, n);
  *mutable_data_of<A>(out.threshold) =
      selected.finish(mutable_data_of<T>(out.values), mutable_data_of<int32_t>(out.indices),
                      mutable_data_of<int32_t>(out.offsets), cap);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_topk(const Tensor& x_in, int64_t budget,
                                                      std::optional<Tensor> hint_in) {
  check_matrix("batch_topk", "x", x_in);
  const std::optional<Tensor> hint = checked_hint("batch_topk", hint_in, x_in);
  FASTSAE_CHECK(budget >= 0, "batch_topk: expected budget >= 0, got ", budget);
  const Tensor x = as_contiguous(x_in);
  const int64_t cap = std::min(budget, x.numel());
  check_entries("batch_topk", cap);
  const Selection s = dispatch_floating("batch_topk", "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    const Acc<T> zero = 0;
    return select<T>(x, cap, &zero, false, hint ? data_of<Acc<T>>(*hint) : nullptr);
  });
  return {s.values, s.indices, s.offsets, s.threshold};
}

std::tuple<Tensor, Tensor, Tensor> threshold_select(const Tensor& x_in, const Tensor& theta_in,
                                                    int64_t cap_in) {
  constexpr const char* op = "threshold_select";
  check_matrix(op, "x", x_in);
  const Tensor x = as_contiguous(x_in), theta = as_contiguous(theta_in);
  check_theta(op, theta, x, x.size(1));
  FASTSAE_CHECK(cap_in >= 0, op, ": expected capacity >= 0, got ", cap_in);
  const int64_t cap = std::min(cap_in, x.numel());
  check_entries(op, cap);
  const Selection s = dispatch_floating(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    return select<T>(x, cap, data_of<Acc<T>>(theta), theta.dim() != 0, nullptr);
  });
  return {s.values, s.indices, s.offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("batch_topk", TORCH_BOX(&batch_topk));
  m.impl("threshold_select", TORCH_BOX(&threshold_select));
}

}  // namespace fastsae::cpu
