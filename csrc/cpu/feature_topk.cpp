// The m[j] largest positive entries of each column j of x [n, F], in the variable layout: rows
// ascending, columns ascending in a row. Ties: the lowest row. NaN is not positive.
//
// Threads own blocks of 64 columns, met in pieces of rows that stay in L2. A piece is copied out of
// the matrix, whose rows lie far apart; the maxima of interleaved groups of its rows bound every
// column's m-th largest entry from below, and one pass with a bound per column then finds little
// more than is kept. Later pieces are bounded by the m-th largest entry so far. What is kept lies
// by column; a stable counting sort, in which threads own rows, puts it into rows.
// Cost: x is read once from memory; scratch of about 2 MiB per thread, and the entries kept once
// more.
// Source: Feature Choice, Ayonrinde 2024 (arXiv 2411.02124).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/aligned_buffer.h"
#include "cpu/kernels.h"
#include "dispatch.h"
#include "torch.h"

namespace fastsae::cpu {
namespace {

constexpr const char* kOp = "feature_topk";
constexpr int64_t kWidth = 64;    // columns of a block
constexpr int64_t kPiece = 2048;  // rows of a piece: 512 KiB of float32
constexpr int64_t kMostGroups = kPiece / 8;
constexpr int64_t kRowsAtOnce = 8;  // rows of a piece that one call filters
constexpr int64_t kAhead = 16;      // rows between a prefetch and its use

// The kept entries by column: those of column j start at start[j], rows ascending.
template <class T>
struct ColumnLists {
  std::vector<int64_t> start;  // [F + 1], sums of min(m, n): capacities, of which counts are used
  std::vector<int32_t> counts;
  AlignedBuffer<T> value_buffer;
  AlignedBuffer<int32_t> row_buffer;
  T* values;
  int32_t* rows;

  ColumnLists(int64_t n, int64_t columns, const int32_t* m)
      : start(static_cast<size_t>(columns + 1), 0), counts(static_cast<size_t>(columns), 0) {
    for (int64_t j = 0; j < columns; ++j) start[j + 1] = start[j] + std::min<int64_t>(m[j], n);
    values = value_buffer.reserve(start[columns]);
    rows = row_buffer.reserve(start[columns]);
  }
};

// Selects in one block of columns after another; one for each thread.
template <class T>
class ColumnBlock {
 public:
  using A = Acc<T>;

  // Takes all memory it will need: `capacity` candidates in a block, `longest` of them in one
  // column.
  void reserve(int64_t capacity, int64_t longest) {
    x_ = x_buffer_.reserve(kPiece * kWidth);
    maxima_ = maxima_buffer_.reserve(kMostGroups * kWidth);
    column_ = column_buffer_.reserve(kMostGroups);
    lower_bounds_ = bound_buffer_.reserve(kRowsAtOnce * kWidth);
    found_ = found_buffer_.reserve(kRowsAtOnce * kWidth + 64);
    codes_ = code_buffer_.reserve(kRowsAtOnce * kWidth + 64);
    values_ = value_buffer_.reserve(capacity);
    rows_ = row_buffer_.reserve(capacity);
    keys_ = key_buffer_.reserve(std::max(longest, kMostGroups));
  }

  // Candidates of a column with m entries to keep: those of one piece may come on top.
  static int64_t capacity(int64_t m, int64_t n) { return m == 0 ? 0 : std::min(n, m + kPiece); }

  // Keeps the m[c] largest of each of `width` columns of x [n, stride], which start at column
  // `first` of the matrix.
  void select(const T* x, int64_t n, int64_t stride, int64_t first, int64_t width, const int32_t* m,
              ColumnLists<T>& out) {
    int64_t largest = 0;
    start_[0] = 0;
    for (int64_t c = 0; c < kWidth; ++c) {
      keep_[c] = c < width ? std::min<int64_t>(m[c], n) : 0;
      largest = std::max(largest, keep_[c]);
      counts_[c] = 0;
      start_[c + 1] = start_[c] + capacity(keep_[c], n);
      set_lower_bound(c, keep_[c] ? A(0) : std::numeric_limits<A>::infinity());
    }
    if (largest == 0) return;
    for (int64_t row = 0; row < n; row += kPiece) {
      const int64_t rows = std::min(kPiece, n - row);
      // Only the first piece has no bound yet. Groups of fewer than 8 rows would say little.
      const int64_t groups = row == 0 ? std::min((4 * largest + 15) / 16 * 16, rows / 8) : 0;
      copy(x + row * stride, rows, stride, width, groups);
      for (int64_t c = 0; c < kWidth; ++c) {
        if (keep_[c] && 2 * keep_[c] <= groups) bound(c, groups);
      }
      filter(row, rows);
      for (int64_t c = 0; c < kWidth; ++c) tighten(c);
    }
    for (int64_t c = 0; c < width; ++c) {
      const A* values = values_ + start_[c];
      T* to = out.values + out.start[first + c];
      for (int64_t j = 0; j < counts_[c]; ++j) to[j] = narrow<T>(values[j]);
      std::copy_n(rows_ + start_[c], counts_[c], out.rows + out.start[first + c]);
      out.counts[first + c] = static_cast<int32_t>(counts_[c]);
    }
  }

 private:
  void set_lower_bound(int64_t c, A lower_bound) {
    for (int64_t r = 0; r < kRowsAtOnce; ++r) lower_bounds_[r * kWidth + c] = lower_bound;
  }

  // x_ = the piece, and maxima_ = the largest positive entries of its groups.
  void copy(const T* x, int64_t rows, int64_t stride, int64_t width, int64_t groups) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    std::fill_n(maxima_, groups * kWidth, A(0));
    int64_t group = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = x + r * stride;
      A* to = x_ + r * kWidth;
      if (r + kAhead < rows) {
        for (int64_t c = 0; c < width; c += kLine) __builtin_prefetch(from + kAhead * stride + c);
      }
      std::fill(to + width, to + kWidth, A(0));
      if (groups == 0) {
        kernel_.widen_row(from, width, to);
      } else {
        kernel_.widen_max(from, width, to, maxima_ + group * kWidth);
        if (++group == groups) group = 0;
      }
    }
  }

  // Raises the threshold of column c to just below a number that as many entries reach as it keeps.
  void bound(int64_t c, int64_t groups) {
    for (int64_t g = 0; g < groups; ++g) column_[g] = maxima_[g * kWidth + c];
    const A reached = keep_[c] == 1 ? *std::max_element(column_, column_ + groups)
                                    : kernels<A>().kth_bound(column_, groups, keep_[c], keys_);
    if (reached > 0) set_lower_bound(c, std::nextafter(reached, A(0)));
  }

  // Drops what column c has too much, and raises its threshold to the smallest value kept: entries
  // that equal it have a higher row and lose, so strict is right.
  void tighten(int64_t c) {
    if (counts_[c] <= keep_[c]) return;
    const int64_t from = start_[c];
    set_lower_bound(
        c, kernels<A>().keep_largest(values_ + from, rows_ + from, counts_[c], keep_[c], keys_));
    counts_[c] = keep_[c];
  }

  // Appends the entries of the piece above the thresholds to the candidates of their columns.
  void filter(int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
      const int64_t size = std::min(kRowsAtOnce, rows - r) * kWidth;
      const int64_t found = kernels<A>().filter(x_ + r * kWidth, nullptr, size, lower_bounds_, true,
                                                Pass::kAbove, 0, found_, codes_);
      for (int64_t j = 0; j < found; ++j) {
        const int64_t c = codes_[j] % kWidth;
        const int64_t to = start_[c] + counts_[c]++;
        values_[to] = found_[j];
        rows_[to] = static_cast<int32_t>(first + r + codes_[j] / kWidth);
      }
    }
  }

  const Kernels<T>& kernel_ = kernels<T>();
  AlignedBuffer<A> x_buffer_, maxima_buffer_, column_buffer_, bound_buffer_, found_buffer_,
      value_buffer_;
  AlignedBuffer<int32_t> code_buffer_, row_buffer_;
  AlignedBuffer<typename Kernels<A>::Key> key_buffer_;
  A *x_, *maxima_, *column_, *lower_bounds_, *found_, *values_;
  int32_t *codes_, *rows_;
  typename Kernels<A>::Key* keys_;
  int64_t keep_[kWidth], counts_[kWidth], start_[kWidth + 1];
};

template <class T>
void select_columns(const T* x, int64_t n, int64_t columns, const int32_t* m, ColumnLists<T>& out) {
  const int64_t blocks = (columns + kWidth - 1) / kWidth;
  const int64_t workers = std::min<int64_t>(blocks, torch::stable::get_num_threads());
  int64_t capacity = 0, longest = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t sum = 0;
    for (int64_t j = b * kWidth; j < std::min(columns, (b + 1) * kWidth); ++j) {
      const int64_t candidates = ColumnBlock<T>::capacity(std::min<int64_t>(m[j], n), n);
      sum += candidates;
      longest = std::max(longest, candidates);
    }
    capacity = std::max(capacity, sum);
  }
  std::vector<ColumnBlock<T>> scratch(static_cast<size_t>(workers));
  for (ColumnBlock<T>& s : scratch) s.reserve(capacity, longest);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t b = w * blocks / workers; b < (w + 1) * blocks / workers; ++b) {
        const int64_t first = b * kWidth;
        scratch[w].select(x + first, n, columns, first, std::min(kWidth, columns - first),
                          m + first, out);
      }
    }
  });
}

// Calls f(column, place in the lists, row) for the kept entries in rows [begin, end), by column.
template <class T, class F>
void for_each_in_rows(const ColumnLists<T>& lists, int64_t begin, int64_t end, F&& f) {
  for (size_t c = 0; c < lists.counts.size(); ++c) {
    const int64_t last = lists.start[c] + lists.counts[c];
    int64_t j = lists.start[c];
    if (begin > 0) {
      const int32_t from = static_cast<int32_t>(begin);
      j = std::lower_bound(lists.rows + j, lists.rows + last, from) - lists.rows;
    }
    for (; j < last && lists.rows[j] < end; ++j) f(static_cast<int32_t>(c), j, lists.rows[j]);
  }
}

template <class T>
void to_rows(const ColumnLists<T>& lists, int64_t n, int64_t capacity, T* values, int32_t* indices,
             int32_t* offsets) {
  std::fill_n(offsets, n + 1, 0);
  torch::stable::parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    for_each_in_rows(lists, begin, end, [&](int32_t, int64_t, int32_t row) { ++offsets[row + 1]; });
  });
  for (int64_t row = 0; row < n; ++row) offsets[row + 1] += offsets[row];
  std::vector<int32_t> cursor(offsets, offsets + n);
  torch::stable::parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    for_each_in_rows(lists, begin, end, [&](int32_t column, int64_t j, int32_t row) {
      const int32_t to = cursor[row]++;
      values[to] = lists.values[j];
      indices[to] = column;
    });
  });
  std::fill(values + offsets[n], values + capacity, narrow<T>(0));
  std::fill(indices + offsets[n], indices + capacity, 0);
}

std::tuple<Tensor, Tensor, Tensor> feature_topk(const Tensor& x_in, const Tensor& m_in,
                                                int64_t capacity_in) {
  check_matrix(kOp, "x", x_in);
  const int64_t n = x_in.size(0), columns = x_in.size(1);
  check_rows(kOp, n);
  check_vector(kOp, "m", m_in, columns);
  check_int32(kOp, "m", m_in);
  const Tensor x = as_contiguous(x_in), m = as_contiguous(m_in);
  const int64_t capacity = selection_capacity(kOp, "capacity", capacity_in, n, columns);
  const int32_t* keep = data_of<int32_t>(m);
  int64_t total = 0, least = 0;
  for (int64_t j = 0; j < columns; ++j) {
    total += std::min<int64_t>(keep[j], n);
    least = std::min<int64_t>(least, keep[j]);
  }
  FASTSAE_CHECK(least >= 0, kOp, ": expected m >= 0, got ", least);
  FASTSAE_CHECK(total <= capacity, kOp, ": expected capacity >= the sum of min(m, n) = ", total,
                ", got ", capacity_in);
  Tensor values = new_empty(x, {capacity}, x.scalar_type());
  Tensor indices = new_empty(x, {capacity}, ScalarType::Int);
  Tensor offsets = new_empty(x, {n + 1}, ScalarType::Int);
  dispatch_floating(kOp, "x", x, [&](auto type) {
    using T = typename decltype(type)::type;
    ColumnLists<T> lists(n, columns, keep);
    if (total > 0) select_columns(data_of<T>(x), n, columns, keep, lists);
    to_rows(lists, n, capacity, mutable_data_of<T>(values), mutable_data_of<int32_t>(indices),
            mutable_data_of<int32_t>(offsets));
  });
  return {values, indices, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("feature_topk", TORCH_BOX(&feature_topk));
}

}  // namespace fastsae::cpu
