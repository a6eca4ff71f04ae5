// Sums of rows picked from a matrix by index, and dot products with them.
//
// A sum goes over all rows for one strip of columns after the other: the strip's sums stay in
// registers, and every line is read once either way. From caches the processor keeps enough rows in
// flight by itself, and fetching ahead costs 10 %; from memory it saves a quarter, for bfloat16
// half (Zen 5). Sums run over j ascending in one accumulator per column, so they depend on nothing
// but the order of the entries.
#pragma once

#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

constexpr int kAhead = 16;  // rows between the one that a sum reads and the one it fetches
constexpr int kRows = 8;    // rows that dot products read side by side

// bfloat16 is read as pairs of vectors, the even and the odd entries.
template <class T>
constexpr bool kPaired = __is_same(T, bf16);

template <class V, class T>
inline void load_two(const T* p, V& a, V& b) {
  if constexpr (kPaired<T>) {
    V::load_pair(p, a, b);
  } else {
    a = V::load(p);
    b = V::load(p + V::kWidth);
  }
}
template <class V, class T>
inline void store_two(T* p, V a, V b) {
  if constexpr (kPaired<T>) {
    V::store_pair(p, a, b);
  } else {
    a.store(p);
    b.store(p + V::kWidth);
  }
}

// Columns [c, c + kCount kWidth) of the sum, in registers while the rows go by. Unrolled by pragma:
// left to itself the compiler moves the sums through memory around the loop over rows.
template <class V, int kCount, class T>
inline void sum_strip(const typename V::A* weights, const int32_t* indices, int64_t count,
                      int64_t listed, const T* rows, int64_t d, int64_t c, const T* bias, T* out) {
  using A = typename V::A;
  V sum[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) sum[i] = V::set1(A(0));
  if (bias) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i += 2) load_two(bias + c + i * V::kWidth, sum[i], sum[i + 1]);
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* row = rows + static_cast<int64_t>(indices[j]) * d + c;
    if (j + kAhead < listed) {
      constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
      const T* ahead = rows + static_cast<int64_t>(indices[j + kAhead]) * d + c;
#pragma GCC unroll 16
      for (int64_t o = 0; o < kCount * V::kWidth; o += kLine) prefetch(ahead + o);
    }
    const V w = V::set1(weights[j]);
    if constexpr (kPaired<T>) {
#pragma GCC unroll 16
      for (int i = 0; i < kCount; i += 2) {
        V even, odd;
        V::load_pair(row + i * V::kWidth, even, odd);
        sum[i] = V::fma(w, even, sum[i]);
        sum[i + 1] = V::fma(w, odd, sum[i + 1]);
      }
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) sum[i] = V::fma(w, V::load(row + i * V::kWidth), sum[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i += 2) store_two(out + c + i * V::kWidth, sum[i], sum[i + 1]);
}

// All whole strips of kCount vectors from column c on; returns the column after them.
template <class V, int kCount, class T>
inline int64_t sum_strips(const typename V::A* weights, const int32_t* indices, int64_t count,
                          int64_t listed, const T* rows, int64_t d, int64_t c, const T* bias,
                          T* out) {
  for (; c + kCount * V::kWidth <= d; c += kCount * V::kWidth) {
    sum_strip<V, kCount>(weights, indices, count, listed, rows, d, c, bias, out);
  }
  return c;
}

template <class V, class T>
void gather_sum(const typename V::A* weights, const int32_t* indices, int64_t count, int64_t listed,
                const T* rows, int64_t d, const T* bias, T* out) {
  using A = typename V::A;
  // Short strips leave room for more rows in flight: 24 vectors were 15 % slower than 16. Of 16 and
  // 12 the one that leaves less to narrower strips.
  int64_t c = 0;
  if (d % (12 * V::kWidth) < d % (16 * V::kWidth)) {
    c = sum_strips<V, 12>(weights, indices, count, listed, rows, d, c, bias, out);
  } else {
    c = sum_strips<V, 16>(weights, indices, count, listed, rows, d, c, bias, out);
  }
  c = sum_strips<V, 4>(weights, indices, count, listed, rows, d, c, bias, out);
  c = sum_strips<V, 2>(weights, indices, count, listed, rows, d, c, bias, out);
  for (; c < d; ++c) {
    A sum = bias ? widen(bias[c]) : A(0);
    for (int64_t j = 0; j < count; ++j) {
      sum += weights[j] * widen(rows[static_cast<int64_t>(indices[j]) * d + c]);
    }
    out[c] = narrow<T>(sum);
  }
}

template <class V, int kCount, class T>
inline void dot_rows(const T* x, const T* const* row, int64_t d, typename V::A* out) {
  using A = typename V::A;
  constexpr int64_t kStep = 2 * V::kWidth;
  V sum[kCount];
  for (int r = 0; r < kCount; ++r) sum[r] = V::set1(A(0));
  int64_t c = 0;
  for (; c + kStep <= d; c += kStep) {
    V left, right;
    load_two(x + c, left, right);
    for (int r = 0; r < kCount; ++r) {
      V a, b;
      load_two(row[r] + c, a, b);
      sum[r] = V::fma(right, b, V::fma(left, a, sum[r]));
    }
  }
  for (int r = 0; r < kCount; ++r) {
    A total = sum[r].sum();
    for (int64_t t = c; t < d; ++t) total += widen(x[t]) * widen(row[r][t]);
    out[r] = total;
  }
}

template <class V, class T>
void gather_dot(const T* x, const int32_t* indices, int64_t count, const T* rows, int64_t d,
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
