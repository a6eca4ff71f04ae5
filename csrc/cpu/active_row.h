// The active entries of a row, for the ops that gather rows of a dictionary for them.
#pragma once

#include <vector>

#include "cpu/sparse_acts_args.h"

namespace fastsae::cpu {

// Values in the dtype of sums; given either in it or in the dtype of the matrix.
inline Tensor accumulated(const char* op, const Tensor& values, const Tensor& matrix) {
  FASTSAE_CHECK(values.scalar_type() == matrix.scalar_type() ||
                    values.scalar_type() == accumulator_type(matrix),
                op, ": expected values to have the dtype of W_dec or of its accumulator");
  return torch::stable::to(values, accumulator_type(matrix));
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
