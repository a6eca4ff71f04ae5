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

// bfloat16 is read as pairs of vectors, the even and the odd entries, so sums of it are kept in
// that order in each whole line of 64 bytes; what is left at the end of a row is in the usual
// order.
template <class T>
constexpr bool kPaired = __is_same(T, bf16);
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

template <class V, int kCount, class T>
inline void add_rows(const typename V::A* weights, const T* const* row, const T* const* next,
                     int64_t d, typename V::A* acc) {
  using A = typename V::A;
  V w[kCount];
  for (int r = 0; r < kCount; ++r) w[r] = V::set1(weights[r]);
  int64_t c = 0;
  for (; c + kLine<T> <= d; c += kLine<T>) {
    if (next) {
      for (int r = 0; r < kRows; ++r) prefetch(next[r] + c);
    }
    if constexpr (kPaired<T>) {
      for (int64_t o = c; o < c + kLine<T>; o += 2 * V::kWidth) {
        V even = V::load(acc + o), odd = V::load(acc + o + V::kWidth);
        for (int r = 0; r < kCount; ++r) {
          V e, f;
          V::load_pair(row[r] + o, e, f);
          even = V::fma(w[r], e, even);
          odd = V::fma(w[r], f, odd);
        }
        even.store(acc + o);
        odd.store(acc + o + V::kWidth);
      }
    } else {
      for (int64_t o = c; o < c + kLine<T>; o += V::kWidth) {
        V sum = V::load(acc + o);
        for (int r = 0; r < kCount; ++r) sum = V::fma(w[r], V::load(row[r] + o), sum);
        sum.store(acc + o);
      }
    }
  }
  for (; c < d; ++c) {
    A sum = acc[c];
    for (int r = 0; r < kCount; ++r) sum += weights[r] * widen(row[r][c]);
    acc[c] = sum;
  }
}

// acc = bias, or 0.
template <class V, class T>
inline void start_sums(const T* bias, int64_t d, typename V::A* acc) {
  using A = typename V::A;
  int64_t c = 0;
  if constexpr (kPaired<T>) {
    for (; bias && c + kLine<T> <= d; c += kLine<T>) {
      for (int64_t o = c; o < c + kLine<T>; o += 2 * V::kWidth) {
        V even, odd;
        V::load_pair(bias + o, even, odd);
        even.store(acc + o);
        odd.store(acc + o + V::kWidth);
      }
    }
  }
  for (; c < d; ++c) acc[c] = bias ? widen(bias[c]) : A(0);
}

// out = acc, rounded.
template <class V, class T>
inline void finish_sums(const typename V::A* acc, int64_t d, T* out) {
  int64_t c = 0;
  if constexpr (kPaired<T>) {
    for (; c + kLine<T> <= d; c += kLine<T>) {
      for (int64_t o = c; o < c + kLine<T>; o += 2 * V::kWidth) {
        V::store_pair(out + o, V::load(acc + o), V::load(acc + o + V::kWidth));
      }
    }
  } else {
    for (; c + V::kWidth <= d; c += V::kWidth) V::load(acc + c).store(out + c);
  }
  for (; c < d; ++c) out[c] = narrow<T>(acc[c]);
}

template <class V, class T>
void gather_sum(const typename V::A* weights, const int32_t* indices, int64_t count, const T* rows,
                int64_t d, const T* bias, typename V::A* acc, T* out) {
  using A = typename V::A;
  if constexpr (sizeof(T) == sizeof(A)) acc = out;  // the same type: no rounding at the end
  start_sums<V>(bias, d, acc);
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
  if constexpr (sizeof(T) != sizeof(A)) finish_sums<V>(acc, d, out);
}

template <class V, int kCount, class T>
inline void dot_rows(const T* x, const T* const* row, const T* const* next, int64_t d,
                     typename V::A* out) {
  using A = typename V::A;
  V sum[kCount];
  for (int r = 0; r < kCount; ++r) sum[r] = V::set1(A(0));
  int64_t c = 0;
  for (; c + kLine<T> <= d; c += kLine<T>) {
    if (next) {
      for (int r = 0; r < kRows; ++r) prefetch(next[r] + c);
    }
    if constexpr (kPaired<T>) {
      for (int64_t o = c; o < c + kLine<T>; o += 2 * V::kWidth) {
        V even, odd;
        V::load_pair(x + o, even, odd);
        for (int r = 0; r < kCount; ++r) {
          V e, f;
          V::load_pair(row[r] + o, e, f);
          sum[r] = V::fma(odd, f, V::fma(even, e, sum[r]));
        }
      }
    } else {
      for (int64_t o = c; o < c + kLine<T>; o += V::kWidth) {
        const V left = V::load(x + o);
        for (int r = 0; r < kCount; ++r) sum[r] = V::fma(left, V::load(row[r] + o), sum[r]);
      }
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
