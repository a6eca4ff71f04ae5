// The operator threshold_select on CUDA: the entries of a matrix above the threshold.
#include "cuda/select_entries.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> threshold_select(const Tensor& x, const Tensor& threshold_in,
                                                    int64_t capacity_in) {
  constexpr const char* op = "threshold_select";
  check_matrix(op, "x", x);
  const Tensor threshold = as_contiguous(threshold_in);
  check_threshold(op, threshold, x, x.size(1));
  check_device(op, "threshold", threshold, x);
  const int64_t capacity = selection_capacity(op, "capacity", capacity_in, x.size(0), x.size(1));
  return select_entries(op, x, capacity, &threshold).entries();
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("threshold_select", TORCH_BOX(&threshold_select));
}

}  // namespace fastsae::cuda
