// The active entries of a row, for the ops that gather rows of a dictionary for them.
#pragma once

#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/sparse_acts_args.h"

namespace fastsae::cpu {

// Values in the dtype of sums; given either in it or in the dtype of the matrix.
inline Tensor accumulated(const char* op, const Tensor& values, const Tensor& matrix) {
  FASTSAE_CHECK(values.scalar_type() == matrix.scalar_type() ||
                    values.scalar_type() == accumulator_type(matrix),
                op, ": expected values to have the dtype of W_dec or of its accumulator");
  return torch::stable::to(values, accumulator_type(matrix));
}

// b_dec, if there is one: checked, and contiguous.
inline std::optional<Tensor> decoder_bias(const char* op, const std::optional<Tensor>& b_dec,
                                          const Tensor& W) {
  if (!b_dec) return std::nullopt;
  check_vector(op, "b_dec", *b_dec, W.size(1));
  FASTSAE_CHECK(b_dec->scalar_type() == W.scalar_type(), op,
                ": expected b_dec to have the dtype of W_dec");
  return as_contiguous(*b_dec);
}

// The kernels of a decoder: R is the type of its rows, T that of its other numbers, R or the type
// of sums.
template <class R, class T>
auto gather_sum_of() {
  if constexpr (std::is_same_v<R, T>) return kernels<R>().gather_sum;
  else return kernels<R>().gather_sum_wide;
}
template <class R, class T>
auto gather_dot_of() {
  if constexpr (std::is_same_v<R, T>) return kernels<R>().gather_dot;
  else return kernels<R>().gather_dot_wide;
}

// Calls f(Type<R>{}, Type<T>{}) with the types of the rows that are read, and of W_dec.
template <class F>
void dispatch_decoder(const char* op, const Tensor& rows, const Tensor& W_dec, F&& f) {
  if (rows.scalar_type() != W_dec.scalar_type()) return f(Type<bf16>{}, Type<float>{});
  dispatch_floating(op, "W_dec", W_dec, [&](auto type) { f(type, type); });
}

// Whether rows of W are fetched ahead: of a matrix larger than L2, or than a core's part of L3, and
// 16-bit rows always. Measured: with it 5 MB take 10 % longer, 21 MB 15 % less, 75 MB a third less.
inline bool fetches_ahead(const Tensor& W) {
  constexpr int64_t kLarge = int64_t{8} << 20;
  const int64_t size = static_cast<int64_t>(W.element_size());
  return size == 2 || W.numel() * size > kLarge;
}

// The active entries of one row: where they are, or a closed-up copy if some are inactive.
template <class A>
struct ActiveRow {
  const A* weights;
  const int32_t* indices;
  int64_t count;
  int64_t listed;  // count, and the entries of later rows that follow
  std::vector<A> weight_space;
  std::vector<int32_t> index_space;

  void read(const SparseActsArgs& e, const A* values, int64_t row) {
    const int64_t begin = e.begin(row), size = e.end(row) - begin;
    weights = values + begin;
    indices = e.index + begin;
    count = size;
    listed = e.total - begin;
    bool all = true;
    for (int64_t j = 0; j < size; ++j) all &= weights[j] != A(0);
    if (all) return;
    weight_space.clear();
    index_space.clear();
    for (int64_t j = begin; j < begin + size; ++j) {
      if (values[j] == A(0)) continue;
      weight_space.push_back(values[j]);
      index_space.push_back(e.index[j]);
    }
    weights = weight_space.data();
    indices = index_space.data();
    listed = count = static_cast<int64_t>(weight_space.size());
  }
};

}  // namespace fastsae::cpu
