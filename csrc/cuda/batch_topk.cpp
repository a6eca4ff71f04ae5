// The operator batch_topk on CUDA: the `budget` largest positive entries of a matrix.
#include "cuda/select_entries.h"

namespace fastsae::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_topk(const Tensor& x, int64_t budget,
                                                      std::optional<Tensor> threshold_guess) {
  constexpr const char* op = "batch_topk";
  check_matrix(op, "x", x);
  check_threshold_guess(op, threshold_guess);  // and no more: a sample serves better here
  if (threshold_guess) check_device(op, "threshold_guess", *threshold_guess, x);
  const int64_t capacity = selection_capacity(op, "budget", budget, x.size(0), x.size(1));
  return select_entries(op, x, capacity, nullptr).entries_and_threshold();
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("batch_topk", TORCH_BOX(&batch_topk));
}

}  // namespace fastsae::cuda
