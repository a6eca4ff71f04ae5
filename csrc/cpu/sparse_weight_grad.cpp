// weight[f] = sum over the list of latent f of values[slot] x[row], bias[f] = sum of values[slot]:
// the gradient of a dictionary, and of its bias, from feature-major lists. Threads own latents, so
// nothing is added across threads and the result does not depend on their number.
// Cost: entries x d read (from cache: x is small) and F x d written once.
#include <vector>

#include "check.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "dispatch.h"

namespace fastsae::cpu {
namespace {

constexpr const char* kOp = "sparse_weight_grad";

// Every list inside the entries, every row inside x, every slot inside values.
void check_lists(const Tensor& values, const Tensor& offsets, const Tensor& rows,
                 const Tensor& slots, const Tensor& x) {
  check_lists_layout(kOp, offsets, rows, slots);
  const int32_t* bound = data_of<int32_t>(offsets);
  const int64_t d_sae = offsets.size(0) - 1;
  bool ordered = bound[0] == 0;
  for (int64_t f = 0; f < d_sae; ++f) ordered = ordered && bound[f] <= bound[f + 1];
  FASTSAE_CHECK(ordered && bound[d_sae] <= rows.size(0), kOp,
                ": expected offsets to ascend from 0 to at most ", rows.size(0));
  bool inside = true;
  for (int32_t j = 0; j < bound[d_sae]; ++j) {
    inside = inside && static_cast<uint32_t>(data_of<int32_t>(rows)[j]) < x.size(0) &&
             static_cast<uint32_t>(data_of<int32_t>(slots)[j]) < values.numel();
  }
  FASTSAE_CHECK(inside, kOp, ": expected rows < n = ", x.size(0), " and slots < ", values.numel());
}

std::tuple<Tensor, Tensor> sparse_weight_grad(const Tensor& values_in, const Tensor& offsets_in,
                                              const Tensor& rows_in, const Tensor& slots_in,
                                              const Tensor& x_in) {
  check_matrix(kOp, "x", x_in);
  const Tensor x = as_contiguous(x_in), offsets = as_contiguous(offsets_in),
               rows = as_contiguous(rows_in), slots = as_contiguous(slots_in);
  FASTSAE_CHECK(
      values_in.scalar_type() == x.scalar_type() || values_in.scalar_type() == accumulator_type(x),
      kOp, ": expected values to have the dtype of x or of its accumulator");
  const Tensor values = as_contiguous(torch::stable::to(values_in, accumulator_type(x)));
  check_lists(values, offsets, rows, slots, x);
  const int64_t d_sae = offsets.size(0) - 1, d = x.size(1);
  Tensor weight = new_empty(x, {d_sae, d}, x.scalar_type());
  Tensor bias = new_empty(x, {d_sae}, x.scalar_type());
  dispatch_floating(kOp, "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const Kernels<T>& kernel = kernels<T>();
    const int32_t* bound = data_of<int32_t>(offsets);
    const int32_t* row = data_of<int32_t>(rows);
    const int32_t* slot = data_of<int32_t>(slots);
    const A* value = data_of<A>(values);
    const T* from = data_of<T>(x);
    T* to = mutable_data_of<T>(weight);
    T* to_bias = mutable_data_of<T>(bias);
    prefer_huge_pages(to, sizeof(T) * static_cast<size_t>(d_sae * d));
    torch::stable::parallel_for(0, d_sae, 64, [&](int64_t begin, int64_t end) {
      thread_local std::vector<A> weights;
      for (int64_t f = begin; f < end; ++f) {
        const int64_t count = bound[f + 1] - bound[f];
        if (static_cast<int64_t>(weights.size()) < count) {
          weights.resize(static_cast<size_t>(count));
        }
        A total = 0;
        for (int64_t j = 0; j < count; ++j) total += weights[j] = value[slot[bound[f] + j]];
        kernel.gather_sum(weights.data(), row + bound[f], count, 0, from, d, nullptr, to + f * d);
        to_bias[f] = narrow<T>(total);
      }
    });
  });
  return {weight, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("sparse_weight_grad", TORCH_BOX(&sparse_weight_grad));
}

}  // namespace fastsae::cpu
