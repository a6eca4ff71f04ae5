// Sums of, and products with, rows picked from a matrix by index.
//
// Rows are read whole, four at a time, while the next four are prefetched: they lie anywhere in a
// matrix that exceeds the caches, so without it each row costs a trip to memory. Sums run over j
// ascending in one accumulator per column, so they do not depend on how rows are grouped.
#pragma once

#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

constexpr int kRows = 4;

template <class V, int kCount, class T>
inline void add_rows(const typename V::A* weights, const T* const* row, const T* const* next,
                     int64_t d, typename V::A* acc) {
  using A = typename V::A;
  constexpr int64_t kLine = 64 / sizeof(T);
  V w[kCount];
  for (int r = 0; r < kCount; ++r) w[r] = V::set1(weights[r]);
  int64_t c = 0;
  for (; c + kLine <= d; c += kLine) {
    if (next) {
      for (int r = 0; r < kRows; ++r) prefetch(next[r] + c);
    }
    for (int64_t o = c; o < c + kLine; o += V::kWidth) {
      V sum = V::load(acc + o);
      for (int r = 0; r < kCount; ++r) sum = V::fma(w[r], V::load(row[r] + o), sum);
      sum.store(acc + o);
    }
  }
  for (; c < d; ++c) {
    A sum = acc[c];
    for (int r = 0; r < kCount; ++r) sum += weights[r] * widen(row[r][c]);
    acc[c] = sum;
  }
}

template <class V, class T>
void gather_sum(const typename V::A* weights, const int32_t* indices, int64_t count, const T* rows,
                int64_t d, const T* bias, typename V::A* acc, T* out) {
  using A = typename V::A;
  if constexpr (sizeof(T) == sizeof(A)) acc = out;  // the same type: no rounding at the end
  for (int64_t c = 0; c < d; ++c) acc[c] = bias ? widen(bias[c]) : A(0);
  int64_t j = 0;
  for (; j + kRows <= count; j += kRows) {
    const T *row[kRows], *next[kRows];
    const bool more = j + 2 * kRows <= count;
    for (int r = 0; r < kRows; ++r) {
      row[r] = rows + static_cast<int64_t>(indices[j + r]) * d;
      next[r] = more ? rows + static_cast<int64_t>(indices[j + kRows + r]) * d : row[r];
    }
    add_rows<V, kRows>(weights + j, row, more ? +next : nullptr, d, acc);
  }
  for (; j < count; ++j) {
    const T* row = rows + static_cast<int64_t>(indices[j]) * d;
    add_rows<V, 1>(weights + j, &row, static_cast<const T* const*>(nullptr), d, acc);
  }
  if constexpr (sizeof(T) != sizeof(A)) {
    int64_t c = 0;
    for (; c + V::kWidth <= d; c += V::kWidth) V::load(acc + c).store(out + c);
    for (; c < d; ++c) out[c] = narrow<T>(acc[c]);
  }
}

template <class V, int kCount, class T>
inline void dot_rows(const T* x, const T* const* row, const T* const* next, int64_t d,
                     typename V::A* out) {
  using A = typename V::A;
  constexpr int64_t kLine = 64 / sizeof(T);
  V sum[kCount];
  for (int r = 0; r < kCount; ++r) sum[r] = V::set1(A(0));
  int64_t c = 0;
  for (; c + kLine <= d; c += kLine) {
    if (next) {
      for (int r = 0; r < kRows; ++r) prefetch(next[r] + c);
    }
    for (int64_t o = c; o < c + kLine; o += V::kWidth) {
      const V left = V::load(x + o);
      for (int r = 0; r < kCount; ++r) sum[r] = V::fma(left, V::load(row[r] + o), sum[r]);
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
    const T *row[kRows], *next[kRows];
    const bool more = j + 2 * kRows <= count;
    for (int r = 0; r < kRows; ++r) {
      row[r] = rows + static_cast<int64_t>(indices[j + r]) * d;
      next[r] = more ? rows + static_cast<int64_t>(indices[j + kRows + r]) * d : row[r];
    }
    dot_rows<V, kRows>(x, row, more ? +next : nullptr, d, out + j);
  }
  for (; j < count; ++j) {
    const T* row = rows + static_cast<int64_t>(indices[j]) * d;
    dot_rows<V, 1>(x, &row, static_cast<const T* const*>(nullptr), d, out + j);
  }
}

}  // namespace
}  // namespace fastsae::cpu
