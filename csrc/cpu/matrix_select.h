// The exact `budget` largest entries of a whole matrix among those above a threshold, met in chunks
// of rows, without ever holding more than the candidates.
//
// After a chunk, the budget-th largest entry so far is a lower bound of the final one, so later
// chunks are filtered by it: over c equal chunks about budget (1 + 1/2 + ... + 1/c) candidates are
// seen. The first bound comes from a sample and is verified by counting; a bound that was too high
// costs a second pass over that chunk and never changes the result. Equal values: the lowest
// (row, column) wins, and candidates are kept in that order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "torch.h"

namespace fastsae::cpu {

template <class A>
class MatrixSelect {
 public:
  // theta: one strict lower threshold for all columns, or one per column.
  MatrixSelect(int64_t n, int64_t m, int64_t budget, const A* theta, bool per_column)
      : m_(m), budget_(budget), theta_(theta), per_column_(per_column), counts_(n, 0) {}

  // Adds rows [first, first + rows) of the matrix, stored at x with row stride m. Rows ascend over
  // the calls.
  template <class T>
  void add(const T* x, const A* bias, int64_t first, int64_t rows) {
    static_assert(std::is_same_v<Acc<T>, A>);
    if (budget_ == 0 || rows == 0) return;
    const Kernels<T>& kernel = kernels<T>();
    if (bounded_ && !per_column_) {
      scan(kernel, x, bias, first, rows, &bound_, false);
    } else {
      A guess;
      if (!per_column_ && sample_bound(x, bias, rows, &guess)) {
        const size_t before = values_.size();
        scan(kernel, x, bias, first, rows, &guess, false);
        if (static_cast<int64_t>(values_.size()) >= budget_) return keep_largest();
        values_.resize(before);
        columns_.resize(before);
        const int64_t half = rows / 2;
        if (rows * m_ > kWholeScan && half > 0) {
          add(x, bias, first, half);
          return add(x + half * m_, bias, first + half, rows - half);
        }
      }
      scan(kernel, x, bias, first, rows, theta_, per_column_);
    }
    if (static_cast<int64_t>(values_.size()) > budget_ + budget_ / 2) keep_largest();
  }

  // Writes the selection in the variable layout; returns the smallest kept value, +inf if none.
  template <class T>
  A finish(T* values, int32_t* indices, int32_t* offsets, int64_t cap) {
    keep_largest();
    int32_t total = 0;
    offsets[0] = 0;
    for (size_t row = 0; row < counts_.size(); ++row) offsets[row + 1] = total += counts_[row];
    A smallest = std::numeric_limits<A>::infinity();
    for (int64_t j = 0; j < total; ++j) {
      smallest = std::min(smallest, values_[j]);
      values[j] = narrow<T>(values_[j]);
      indices[j] = columns_[j];
    }
    for (int64_t j = total; j < cap; ++j) {
      values[j] = narrow<T>(A(0));
      indices[j] = 0;
    }
    return smallest;
  }

 private:
  // Entries that a scan without a useful bound may turn into candidates at once (64 MiB).
  static constexpr int64_t kWholeScan = int64_t{1} << 23;

  // Estimates, from pieces of up to 64 rows, a number that somewhat more than `budget` entries of
  // these rows exceed. False when the sample is too small to say, or all of theta's is needed.
  template <class T>
  bool sample_bound(const T* x, const A* bias, int64_t rows, A* bound) {
    constexpr int64_t kSampleRows = 64, kPiece = 256;
    const int64_t total = rows * m_;
    if (total < 16 * kSampleRows * kPiece) return false;
    const int64_t sample_rows = std::min(kSampleRows, rows);
    const int64_t pieces = std::max<int64_t>(1, m_ / (8 * kPiece));
    std::vector<A> sample;
    for (int64_t r = 0; r < sample_rows; ++r) {
      const int64_t row = r * rows / sample_rows;
      for (int64_t p = 0; p < pieces; ++p) {
        const int64_t column = (p * m_ / pieces + r * kPiece) % m_;
        for (int64_t c = column; c < std::min(column + kPiece, m_); ++c) {
          sample.push_back(widen(x[row * m_ + c]) + (bias ? bias[c] : A(0)));
        }
      }
    }
    const double expected = static_cast<double>(budget_) * static_cast<double>(sample.size()) /
                            static_cast<double>(total);
    const int64_t rank = static_cast<int64_t>(1.25 * expected + 4.0 * std::sqrt(expected)) + 8;
    const auto above_theta = [this](A v) { return v > theta_[0]; };
    const auto end = std::partition(sample.begin(), sample.end(), above_theta);
    if (rank >= end - sample.begin()) return false;
    std::nth_element(sample.begin(), sample.begin() + rank, end, std::greater<>());
    *bound = std::nextafter(sample[rank], -std::numeric_limits<A>::infinity());
    return *bound > theta_[0];
  }

  template <class T>
  void scan(const Kernels<T>& kernel, const T* x, const A* bias, int64_t first, int64_t rows,
            const A* tau, bool per_column) {
    constexpr int64_t kBlock = 4096;
    struct Part {
      std::vector<A> values;
      std::vector<int32_t> columns;
    };
    const int64_t task_rows = std::max<int64_t>(1, 65536 / m_);
    const int64_t tasks = (rows + task_rows - 1) / task_rows;
    std::vector<Part> parts(static_cast<size_t>(tasks));
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      thread_local std::vector<A> v(kBlock + 64);
      thread_local std::vector<int32_t> c(kBlock + 64);
      for (int64_t task = begin; task < end; ++task) {
        Part& part = parts[task];
        const int64_t last = std::min(rows, (task + 1) * task_rows);
        for (int64_t row = task * task_rows; row < last; ++row) {
          int32_t kept = 0;
          for (int64_t j = 0; j < m_; j += kBlock) {
            const int64_t found =
                kernel.filter(x + row * m_ + j, bias ? bias + j : nullptr, std::min(kBlock, m_ - j),
                              tau + (per_column ? j : 0), per_column, Pass::kAbove,
                              static_cast<int32_t>(j), v.data(), c.data());
            part.values.insert(part.values.end(), v.begin(), v.begin() + found);
            part.columns.insert(part.columns.end(), c.begin(), c.begin() + found);
            kept += static_cast<int32_t>(found);
          }
          counts_[first + row] = kept;
        }
      }
    });
    for (const Part& part : parts) {
      values_.insert(values_.end(), part.values.begin(), part.values.end());
      columns_.insert(columns_.end(), part.columns.begin(), part.columns.end());
    }
  }

  // Drops all but the `budget` largest candidates, in place and in order, and raises the bound.
  void keep_largest() {
    const int64_t size = static_cast<int64_t>(values_.size());
    if (size < budget_ || size == 0) return;
    ranked_.assign(values_.begin(), values_.end());
    std::nth_element(ranked_.begin(), ranked_.begin() + (budget_ - 1), ranked_.end(),
                     std::greater<>());
    bound_ = ranked_[budget_ - 1];  // later entries of this value lose the tie: strict is right
    bounded_ = true;
    if (size == budget_) return;
    int64_t ties = budget_;
    for (int64_t j = 0; j < size; ++j) ties -= values_[j] > bound_;
    int64_t from = 0, to = 0;
    for (int32_t& count : counts_) {
      const int64_t row_end = from + count, row_start = to;
      for (; from < row_end; ++from) {
        const bool tie = values_[from] == bound_;
        if (tie ? ties-- <= 0 : values_[from] < bound_) continue;
        values_[to] = values_[from];
        columns_[to++] = columns_[from];
      }
      count = static_cast<int32_t>(to - row_start);
    }
    values_.resize(static_cast<size_t>(to));
    columns_.resize(static_cast<size_t>(to));
  }

  int64_t m_, budget_;
  const A* theta_;
  bool per_column_;
  bool bounded_ = false;
  A bound_ = A(0);
  std::vector<A> values_, ranked_;
  std::vector<int32_t> columns_, counts_;
};

}  // namespace fastsae::cpu
