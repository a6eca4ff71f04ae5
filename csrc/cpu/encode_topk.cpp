// values, indices [n, k] = topk of (x - b_dec) W_enc^T + b_enc, a chunk of rows at a time: the
// library's GEMM, then the row selection with the bias added as it reads.
#include "cpu/encode_chunks.h"
#include "cpu/row_select.h"

namespace fastsae::cpu {
namespace {

template <class A>
A rectified(A v, bool relu) {
  return relu && v <= A(0) ? A(0) : v;
}

// Rows where only m < k latents may be selected: all of them, and enough of the lowest others with
// value 0, in ascending order. Returns the k latents; from[j] is the position of latent j in the
// compacted pre-activations, -1 for a filler.
std::vector<int32_t> pad_latents(const std::vector<int32_t>& latents, int64_t k,
                                 std::vector<int32_t>& from) {
  std::vector<int32_t> all;
  size_t next = 0;
  int64_t fillers = k - static_cast<int64_t>(latents.size());
  for (int32_t f = 0; static_cast<int64_t>(all.size()) < k; ++f) {
    if (next < latents.size() && latents[next] == f) {
      from.push_back(static_cast<int32_t>(next++));
      all.push_back(f);
    } else if (fillers > 0) {
      --fillers;
      from.push_back(-1);
      all.push_back(f);
    }
  }
  return all;
}

template <class T>
void select_all(const EncoderInput& in, int64_t k, bool relu, T* values, int32_t* indices) {
  using A = Acc<T>;
  std::vector<int32_t> from;
  const std::vector<int32_t> all = pad_latents(in.latents, k, from);
  const auto fill = [&](const T* pre, const A* bias, int64_t first, int64_t rows) {
    const int64_t m = in.W_enc.size(0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < k; ++j) {
        A v = 0;
        if (pre && from[j] >= 0) v = widen(pre[r * m + from[j]]) + (bias ? bias[from[j]] : A(0));
        values[(first + r) * k + j] = narrow<T>(rectified(v, relu));
        indices[(first + r) * k + j] = all[j];
      }
    }
  };
  if (in.latents.empty()) fill(nullptr, nullptr, 0, in.x.size(0));
  else for_each_chunk<T>(in, fill);
}

template <class T>
void select_chunked(const EncoderInput& in, int64_t k, bool relu, T* values, int32_t* indices) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t m = in.W_enc.size(0);
  for_each_chunk<T>(in, [&](const T* pre, const Acc<T>* bias, int64_t first, int64_t rows) {
    const int64_t grain = std::max<int64_t>(1, 16384 / m);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      thread_local RowScratch<Acc<T>> s;
      for (int64_t r = begin; r < end; ++r) {
        select_row(kernel, pre + r * m, bias, m, k, s);
        T* v = values + (first + r) * k;
        int32_t* index = indices + (first + r) * k;
        for (int64_t j = 0; j < k; ++j) {
          v[j] = narrow<T>(rectified(s.values[j], relu));
          index[j] = in.masked ? in.latents[s.indices[j]] : s.indices[j];
        }
      }
    });
  });
}

std::tuple<Tensor, Tensor> encode_topk(const Tensor& x, const Tensor& W_enc,
                                       std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
                                       int64_t k, std::optional<Tensor> mask, bool relu) {
  const EncoderInput in = encoder_input("encode_topk", x, W_enc, b_enc, b_dec, mask);
  check_k("encode_topk", k, in.d_sae);
  const int64_t n = in.x.size(0);
  Tensor values = new_empty(x, {n, k}, x.scalar_type());
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  dispatch_floating("encode_topk", "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool all = in.masked && static_cast<int64_t>(in.latents.size()) < k;
    (all ? select_all<T> : select_chunked<T>)(in, k, relu, mutable_data_of<T>(values),
                                              mutable_data_of<int32_t>(indices));
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("encode_topk", TORCH_BOX(&encode_topk));
}

}  // namespace fastsae::cpu
