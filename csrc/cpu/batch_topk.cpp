// The `budget` largest positive entries of x [n, F] in the variable layout.
#include "cpu/select_entries.h"

namespace fastsae::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_topk(const Tensor& x_in, int64_t budget,
                                                      std::optional<Tensor> guess_in) {
  constexpr const char* op = "batch_topk";
  check_matrix(op, "x", x_in);
  const std::optional<Tensor> guess = threshold_guess(op, guess_in, x_in);
  const Tensor x = as_contiguous(x_in);
  const int64_t capacity = selection_capacity(op, "budget", budget, x.size(0), x.size(1));
  return dispatch_floating(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    const Acc<T> zero = 0;
    return select_entries<T>(x, capacity, &zero, false, guess ? data_of<Acc<T>>(*guess) : nullptr)
        .entries_and_threshold();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("batch_topk", TORCH_BOX(&batch_topk));
}

}  // namespace fastsae::cpu
