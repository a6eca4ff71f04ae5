// The entries of x [n, F] above the threshold, in the variable layout: the `capacity` largest of
// them if there are more.
#include "cpu/select_entries.h"

namespace fastsae::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> threshold_select(const Tensor& x_in, const Tensor& threshold_in,
                                                    int64_t capacity_in) {
  constexpr const char* op = "threshold_select";
  check_matrix(op, "x", x_in);
  const Tensor x = as_contiguous(x_in), threshold = as_contiguous(threshold_in);
  check_threshold(op, threshold, x, x.size(1));
  const int64_t capacity = selection_capacity(op, "capacity", capacity_in, x.size(0), x.size(1));
  return dispatch_floating(op, "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    return select_entries<T>(x, capacity, data_of<Acc<T>>(threshold), threshold.dim() != 0, nullptr)
        .entries();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("threshold_select", TORCH_BOX(&threshold_select));
}

}  // namespace fastsae::cpu
