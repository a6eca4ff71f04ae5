// values, indices [n, k] = the k largest entries of each row of x [n, F]. Threads own rows.
#include "check.h"
#include "cpu/row_select.h"
#include "dispatch.h"
#include "torch.h"

namespace fastsae::cpu {
namespace {

template <class T>
void topk_rows(const T* x, int64_t n, int64_t m, int64_t k, bool sorted, T* values,
               int32_t* indices) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(m, 1));
  torch::stable::parallel_for(0, n, grain, [=, &kernel](int64_t begin, int64_t end) {
    thread_local RowScratch<Acc<T>> s;
    for (int64_t row = begin; row < end; ++row) {
      select_row(kernel, x + row * m, static_cast<const Acc<T>*>(nullptr), m, k, s);
      if (sorted) sort_descending(s);
      for (int64_t j = 0; j < k; ++j) {
        values[row * k + j] = narrow<T>(s.values[j]);
        indices[row * k + j] = s.indices[j];
      }
    }
  });
}

std::tuple<Tensor, Tensor> topk(const Tensor& x_in, int64_t k, bool sorted) {
  check_matrix("topk", "x", x_in);
  const int64_t n = x_in.size(0), m = x_in.size(1);
  check_k("topk", k, m);
  const Tensor x = as_contiguous(x_in);
  Tensor values = new_empty(x, {n, k}, x.scalar_type());
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  dispatch_floating("topk", "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    topk_rows(data_of<T>(x), n, m, k, sorted, mutable_data_of<T>(values),
              mutable_data_of<int32_t>(indices));
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("topk", TORCH_BOX(&topk));
}

}  // namespace fastsae::cpu
