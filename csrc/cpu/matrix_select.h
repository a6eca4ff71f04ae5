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
#include "sample.h"
#include "torch.h"

namespace fastsae::cpu {

// Entries found in consecutive rows, by (row, column).
template <class A>
struct FoundEntries {
  std::vector<A> values;
  std::vector<int32_t> columns, counts;  // counts: of each row
};

template <class A>
class MatrixSelect {
 public:
  // threshold: one number that entries must exceed in all columns, or one per column.
  MatrixSelect(int64_t n, int64_t m, int64_t budget, const A* threshold, bool per_column)
      : m_(m), budget_(budget), threshold_(threshold), per_column_(per_column), counts_(n, 0) {}

  // Adds rows [first, first + rows) of the matrix, stored at x with row stride m. Rows ascend over
  // the calls.
  template <class T>
  void add(const T* x, const A* bias, int64_t first, int64_t rows) {
    static_assert(std::is_same_v<Acc<T>, A>);
    if (budget_ == 0 || rows == 0 || m_ == 0) return;
    const Kernels<T>& kernel = kernels<T>();
    if (bounded_ && !per_column_) {
      scan(kernel, x, bias, first, rows, &lower_bound_, false);
    } else {
      if (threshold_guess_ > threshold_[0] && !per_column_ &&
          try_bound(kernel, x, bias, first, rows, threshold_guess_))
        return;
      A sampled;
      if (!per_column_ && sample_bound(x, bias, rows, &sampled)) {
        if (try_bound(kernel, x, bias, first, rows, sampled)) return;
        const int64_t half = rows / 2;
        if (rows * m_ > kWholeScan && half > 0) {
          add(x, bias, first, half);
          return add(x + half * m_, bias, first + half, rows - half);
        }
      }
      scan(kernel, x, bias, first, rows, threshold_, per_column_);
    }
    if (static_cast<int64_t>(values_.size()) > budget_ + budget_ / 2) keep_largest();
  }

  // About what the smallest kept value will be, taken a little lower; it changes the time, never
  // the result.
  void guess_threshold(A guess) {
    if (std::isfinite(guess)) threshold_guess_ = guess * A(0.95);
  }
  A threshold_guess() const { return threshold_guess_; }

  // For a caller that filters the matrix itself: adds what it found in rows first, first + 1, ...
  // above `lower_bound()`, as it was before.
  void append(int64_t first, const FoundEntries<A>& found) {
    values_.insert(values_.end(), found.values.begin(), found.values.end());
    columns_.insert(columns_.end(), found.columns.begin(), found.columns.end());
    std::copy(found.counts.begin(), found.counts.end(), counts_.begin() + first);
    if (static_cast<int64_t>(values_.size()) > budget_ + budget_ / 2) keep_largest();
  }

  // What an entry must exceed to be among the largest, if there is one threshold for all columns.
  A lower_bound() const { return bounded_ ? std::max(lower_bound_, threshold_[0]) : threshold_[0]; }

  void clear() {
    values_.clear();
    columns_.clear();
    std::fill(counts_.begin(), counts_.end(), 0);
    bounded_ = false;
  }

  bool full() const { return static_cast<int64_t>(values_.size()) >= budget_; }

  // A number that somewhat more than `budget` entries of the matrix exceed, judged by a sample of
  // it; the threshold where the sample does not say.
  A bound_from_sample(const A* sample, int64_t size, int64_t total) {
    const int64_t rank = sample_rank(budget_, size, total);
    if (rank >= size) return threshold_[0];
    keys_.resize(std::max(keys_.size(), static_cast<size_t>(size)));
    const A found = kernels<A>().kth_bound(sample, size, rank, keys_.data());
    return std::max(threshold_[0], std::nextafter(found, -std::numeric_limits<A>::infinity()));
  }

  // Writes the selection in the variable layout; returns the smallest kept value, +inf if none.
  template <class T>
  A finish(T* values, int32_t* indices, int32_t* offsets, int64_t capacity) {
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
    for (int64_t j = total; j < capacity; ++j) {
      values[j] = narrow<T>(A(0));
      indices[j] = 0;
    }
    return smallest;
  }

 private:
  // Entries that a scan without a useful bound may turn into candidates at once (64 MiB).
  static constexpr int64_t kWholeScan = int64_t{1} << 23;

  // A bound from pieces of up to 64 rows. False when the sample is too small to say, or all entries
  // above the threshold are needed.
  template <class T>
  bool sample_bound(const T* x, const A* bias, int64_t rows, A* bound) {
    constexpr int64_t kSampleRows = 64, kPiece = 256;
    const int64_t total = rows * m_;
    if (total < 16 * kSampleRows * kPiece) return false;
    const Kernels<T>& kernel = kernels<T>();
    const int64_t sample_rows = std::min(kSampleRows, rows);
    const int64_t pieces = std::max<int64_t>(1, m_ / (8 * kPiece));
    std::vector<A> sample(static_cast<size_t>(sample_rows * pieces * kPiece));
    int64_t size = 0;
    for (int64_t r = 0; r < sample_rows; ++r) {
      const int64_t row = r * rows / sample_rows;
      for (int64_t p = 0; p < pieces; ++p) {
        const int64_t column = (p * m_ / pieces + r * kPiece) % m_;
        const int64_t count = std::min(kPiece, m_ - column);
        kernel.widen_row(x + row * m_ + column, count, sample.data() + size);
        for (int64_t c = 0; bias && c < count; ++c) sample[size + c] += bias[column + c];
        size += count;
      }
    }
    *bound = bound_from_sample(sample.data(), size, total);
    return *bound > threshold_[0];
  }

  // Scans with a bound that may be too high; false, and nothing added, if it was.
  template <class T>
  bool try_bound(const Kernels<T>& kernel, const T* x, const A* bias, int64_t first, int64_t rows,
                 A bound) {
    const size_t before = values_.size();
    scan(kernel, x, bias, first, rows, &bound, false);
    if (full()) {
      keep_largest();
      return true;
    }
    values_.resize(before);
    columns_.resize(before);
    return false;
  }

  template <class T>
  void scan(const Kernels<T>& kernel, const T* x, const A* bias, int64_t first, int64_t rows,
            const A* lower_bound, bool per_column) {
    constexpr int64_t kBlock = 4096;
    const int64_t task_rows = std::max<int64_t>(1, 65536 / m_);
    const int64_t tasks = (rows + task_rows - 1) / task_rows;
    std::vector<FoundEntries<A>> parts(static_cast<size_t>(tasks));
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      thread_local std::vector<A> v(kBlock + 64);
      thread_local std::vector<int32_t> c(kBlock + 64);
      for (int64_t task = begin; task < end; ++task) {
        FoundEntries<A>& part = parts[task];
        const int64_t last = std::min(rows, (task + 1) * task_rows);
        for (int64_t row = task * task_rows; row < last; ++row) {
          int32_t kept = 0;
          for (int64_t j = 0; j < m_; j += kBlock) {
            const int64_t found =
                kernel.filter(x + row * m_ + j, bias ? bias + j : nullptr, std::min(kBlock, m_ - j),
                              lower_bound + (per_column ? j : 0), per_column, Pass::kAbove,
                              static_cast<int32_t>(j), v.data(), c.data());
            part.values.insert(part.values.end(), v.begin(), v.begin() + found);
            part.columns.insert(part.columns.end(), c.begin(), c.begin() + found);
            kept += static_cast<int32_t>(found);
          }
          counts_[first + row] = kept;
        }
      }
    });
    for (const FoundEntries<A>& part : parts) {
      values_.insert(values_.end(), part.values.begin(), part.values.end());
      columns_.insert(columns_.end(), part.columns.begin(), part.columns.end());
    }
  }

  // Drops all but the `budget` largest candidates, in place and in order, and raises the bound.
  void keep_largest() {
    const int64_t size = static_cast<int64_t>(values_.size());
    if (size < budget_ || size == 0) return;
    keys_.resize(std::max(keys_.size(), static_cast<size_t>(size)));
    lower_bound_ = kernels<A>().kth_bound(values_.data(), size, budget_, keys_.data());
    bounded_ = true;  // later entries of the bound's value lose the tie: strict is right
    if (size == budget_) return;
    int64_t ties = budget_;
    for (int64_t j = 0; j < size; ++j) ties -= values_[j] > lower_bound_;
    int64_t from = 0, to = 0;
    for (int32_t& count : counts_) {
      const int64_t row_end = from + count, row_start = to;
      for (; from < row_end; ++from) {
        const bool tie = values_[from] == lower_bound_;
        if (tie ? ties-- <= 0 : values_[from] < lower_bound_) continue;
        values_[to] = values_[from];
        columns_[to++] = columns_[from];
      }
      count = static_cast<int32_t>(to - row_start);
    }
    values_.resize(static_cast<size_t>(to));
    columns_.resize(static_cast<size_t>(to));
  }

  int64_t m_, budget_;
  const A* threshold_;
  bool per_column_;
  bool bounded_ = false;
  A lower_bound_ = A(0);
  A threshold_guess_ = -std::numeric_limits<A>::infinity();
  std::vector<A> values_;
  std::vector<typename Kernels<A>::Key> keys_;
  std::vector<int32_t> columns_, counts_;
};

}  // namespace fastsae::cpu
