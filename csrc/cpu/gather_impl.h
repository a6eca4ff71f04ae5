// Sums of rows picked from a matrix by index, and dot products with them.
//
// Eight rows at a time are read side by side, from their first column to their last: so many
// streams hide the latency of memory, and the sums, which pass through L1 once for eight rows, cost
// little. 16-bit rows, whose sums a row of theirs cannot hold, go by for one strip of columns after
// the other, whose sums stay in registers. Rows are fetched ahead into L2, where far more lines can
// be on their way than into L1: into L1 was no faster than not at all, into L2 takes half as long
// (Zen 4). Sums run over j ascending in one accumulator per column, so they depend on nothing but
// the order of the entries.
#pragma once

#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

constexpr int kRows = 8;         // rows that are read side by side
constexpr int kAhead = 16;       // rows between the one that is read and the one that is fetched
constexpr int kStripAhead = 32;  // the same for parts of rows

template <int kNumber>
struct Count {
  static constexpr int value = kNumber;
};

// Rows of bfloat16 are read as pairs of vectors, the even and the odd entries, and so is what meets
// them.
template <class Row>
constexpr bool kPaired = __is_same(Row, bf16);

template <class Row, class V, class T>
inline void load_two(const T* p, V& a, V& b) {
  if constexpr (kPaired<Row>) {
    V::load_pair(p, a, b);
  } else {
    a = V::load(p);
    b = V::load(p + V::kWidth);
  }
}
template <class Row, class V, class T>
inline void store_two(T* p, V a, V b) {
  if constexpr (kPaired<Row>) {
    V::store_pair(p, a, b);
  } else {
    a.store(p);
    b.store(p + V::kWidth);
  }
}

// out[0, n) += the sum over r < kCount of weights[r] row[r][0, n), from 0 if kFirst, while the rows
// at `ahead` are fetched if kFetch. n is a multiple of 2 kWidth.
template <class V, int kCount, bool kFirst, bool kFetch, class A>
inline void add_rows(const A* weights, const A* const* row, const A* const* ahead, int64_t n,
                     A* out) {
  constexpr int64_t kStep = 2 * V::kWidth, kLine = 64 / static_cast<int64_t>(sizeof(A));
  V w[kCount];
  for (int r = 0; r < kCount; ++r) w[r] = V::set1(weights[r]);
  for (int64_t c = 0; c < n; c += kStep) {
    if (kFetch && (kStep >= kLine || c % kLine == 0)) {
      for (int r = 0; r < kCount; ++r) {
        for (int64_t o = 0; o < kStep; o += kLine) prefetch_to_l2(ahead[r] + c + o);
      }
    }
    V left = kFirst ? V::set1(A(0)) : V::load(out + c);
    V right = kFirst ? V::set1(A(0)) : V::load(out + c + V::kWidth);
    for (int r = 0; r < kCount; ++r) {
      left = V::fma(w[r], V::load(row[r] + c), left);
      right = V::fma(w[r], V::load(row[r] + c + V::kWidth), right);
    }
    left.store(out + c);
    right.store(out + c + V::kWidth);
  }
}

// Adds rows j, j + 1, ... j + kCount - 1 of the list.
template <class V, int kCount, class A>
inline void add_listed(const A* weights, const int32_t* indices, int64_t j, int64_t listed,
                       const A* rows, int64_t d, int64_t n, bool first, A* out) {
  const A *row[kCount], *ahead[kCount];
  const bool fetch = j + kAhead < listed;
  for (int r = 0; r < kCount; ++r) {
    const int64_t next = j + r + kAhead < listed ? j + r + kAhead : j + r;
    row[r] = rows + static_cast<int64_t>(indices[j + r]) * d;
    ahead[r] = rows + static_cast<int64_t>(indices[next]) * d;
  }
  weights += j;
  if (first && fetch) add_rows<V, kCount, true, true>(weights, row, ahead, n, out);
  else if (first) add_rows<V, kCount, true, false>(weights, row, ahead, n, out);
  else if (fetch) add_rows<V, kCount, false, true>(weights, row, ahead, n, out);
  else add_rows<V, kCount, false, false>(weights, row, ahead, n, out);
}

// The first columns of the sum, side by side; returns how many.
template <class V, class A>
inline int64_t sum_side_by_side(const A* weights, const int32_t* indices, int64_t count,
                                int64_t listed, const A* rows, int64_t d, const A* bias, A* out) {
  const int64_t n = d - d % (2 * V::kWidth);
  const bool fresh = !bias && count > 0;
  for (int64_t c = 0; !fresh && c < n; ++c) out[c] = bias ? bias[c] : A(0);
  int64_t j = 0;
  const auto add = [&](auto rows_at_once) {
    constexpr int kCount = decltype(rows_at_once)::value;
    add_listed<V, kCount>(weights, indices, j, listed, rows, d, n, fresh && j == 0, out);
    j += kCount;
  };
  while (j + kRows <= count) add(Count<kRows>{});
  if (j + 4 <= count) add(Count<4>{});
  if (j + 2 <= count) add(Count<2>{});
  if (j < count) add(Count<1>{});
  return n;
}

// Columns [c, c + kCount kWidth) of the sum, in registers while the rows go by. Unrolled by pragma:
// left to itself the compiler moves the sums through memory around the loop over rows.
template <class V, int kCount, class T, class O>
inline void sum_strip(const typename V::A* weights, const int32_t* indices, int64_t count,
                      int64_t listed, const T* rows, int64_t d, int64_t c, const O* bias, O* out) {
  using A = typename V::A;
  V sum[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) sum[i] = V::set1(A(0));
  if (bias) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i += 2) load_two<T>(bias + c + i * V::kWidth, sum[i], sum[i + 1]);
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* row = rows + static_cast<int64_t>(indices[j]) * d + c;
    if (j + kStripAhead < listed) {
      constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
      const T* ahead = rows + static_cast<int64_t>(indices[j + kStripAhead]) * d + c;
#pragma GCC unroll 16
      for (int64_t o = 0; o < kCount * V::kWidth; o += kLine) prefetch_to_l2(ahead + o);
    }
    const V w = V::set1(weights[j]);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i += 2) {
      V even, odd;
      load_two<T>(row + i * V::kWidth, even, odd);
      sum[i] = V::fma(w, even, sum[i]);
      sum[i + 1] = V::fma(w, odd, sum[i + 1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i += 2) store_two<T>(out + c + i * V::kWidth, sum[i], sum[i + 1]);
}

// All whole strips of kCount vectors from column c on; returns the column after them.
template <class V, int kCount, class T, class O>
inline int64_t sum_strips(const typename V::A* weights, const int32_t* indices, int64_t count,
                          int64_t listed, const T* rows, int64_t d, int64_t c, const O* bias,
                          O* out) {
  for (; c + kCount * V::kWidth <= d; c += kCount * V::kWidth) {
    sum_strip<V, kCount>(weights, indices, count, listed, rows, d, c, bias, out);
  }
  return c;
}

// The first columns of the sum, strip by strip; returns how many. Short strips leave room for more
// rows in flight: 24 vectors were 15 % slower than 16. Of 16 and 12 the one that leaves less to
// narrower strips.
template <class V, class T, class O>
inline int64_t sum_by_strips(const typename V::A* weights, const int32_t* indices, int64_t count,
                             int64_t listed, const T* rows, int64_t d, const O* bias, O* out) {
  int64_t c = 0;
  if (V::kAccumulators < 16 || d % (12 * V::kWidth) < d % (16 * V::kWidth)) {
    c = sum_strips<V, 12>(weights, indices, count, listed, rows, d, c, bias, out);
  } else {
    c = sum_strips<V, 16>(weights, indices, count, listed, rows, d, c, bias, out);
  }
  c = sum_strips<V, 4>(weights, indices, count, listed, rows, d, c, bias, out);
  return sum_strips<V, 2>(weights, indices, count, listed, rows, d, c, bias, out);
}

// O: of bias and out, T or the type of sums.
template <class V, class T, class O>
void gather_sum(const typename V::A* weights, const int32_t* indices, int64_t count, int64_t listed,
                const T* rows, int64_t d, const O* bias, O* out) {
  using A = typename V::A;
  int64_t c;
  if constexpr (__is_same(T, A)) {
    c = sum_side_by_side<V>(weights, indices, count, listed, rows, d, bias, out);
  } else {
    c = sum_by_strips<V>(weights, indices, count, listed, rows, d, bias, out);
  }
  for (; c < d; ++c) {
    A sum = bias ? widen(bias[c]) : A(0);
    for (int64_t j = 0; j < count; ++j) {
      sum += weights[j] * widen(rows[static_cast<int64_t>(indices[j]) * d + c]);
    }
    out[c] = narrow<O>(sum);
  }
}

template <class V, int kCount, class T, class O>
inline void dot_rows(const O* x, const T* const* row, int64_t d, typename V::A* out) {
  using A = typename V::A;
  constexpr int64_t kStep = 2 * V::kWidth;
  V sum[kCount];
  for (int r = 0; r < kCount; ++r) sum[r] = V::set1(A(0));
  int64_t c = 0;
  for (; c + kStep <= d; c += kStep) {
    V left, right;
    load_two<T>(x + c, left, right);
    for (int r = 0; r < kCount; ++r) {
      V a, b;
      load_two<T>(row[r] + c, a, b);
      sum[r] = V::fma(right, b, V::fma(left, a, sum[r]));
    }
  }
  for (int r = 0; r < kCount; ++r) {
    A total = sum[r].sum();
    for (int64_t t = c; t < d; ++t) total += widen(x[t]) * widen(row[r][t]);
    out[r] = total;
  }
}

// O: of x, T or the type of sums.
template <class V, class T, class O>
void gather_dot(const O* x, const int32_t* indices, int64_t count, const T* rows, int64_t d,
                typename V::A* out) {
  int64_t j = 0;
  for (; j + kRows <= count; j += kRows) {
    const T* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = rows + static_cast<int64_t>(indices[j + r]) * d;
    dot_rows<V, kRows>(x, row, d, out + j);
  }
  for (; j < count; ++j) {
    const T* row = rows + static_cast<int64_t>(indices[j]) * d;
    dot_rows<V, 1>(x, &row, d, out + j);
  }
}

}  // namespace
}  // namespace fastsae::cpu
