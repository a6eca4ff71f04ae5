// What encoders do to the pre-activations of some latents and the tokens of a block, while these
// are in a cache: a few operations for each sum of the matmul.
#pragma once

#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

template <class V>
void max_rows(const typename V::A* x, int64_t rows, int64_t stride, int64_t n, int32_t first,
              typename V::A* best, int32_t* at) {
  using A = typename V::A;
  int64_t t = 0;
  for (; t + V::kWidth <= n; t += V::kWidth) {
    V most = V::load(best + t), row = V::set1(A(-1));  // the row as a number: -1 for none
    for (int64_t r = 0; r < rows; ++r) {
      const V v = V::load(x + r * stride + t);
      const typename V::Mask wins = V::wins(v, most);
      most = V::select(wins, v, most);
      row = V::select(wins, V::set1(static_cast<A>(r)), row);
    }
    most.store(best + t);
    A which[V::kWidth];
    row.store(which);
    for (int lane = 0; lane < V::kWidth; ++lane) {
      if (which[lane] >= 0) at[t + lane] = first + static_cast<int32_t>(which[lane]);
    }
  }
  for (; t < n; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      const A v = x[r * stride + t];
      if (!(v > best[t]) && (v == v || best[t] != best[t])) continue;
      best[t] = v;
      at[t] = first + static_cast<int32_t>(r);
    }
  }
}

template <class V>
void add_magnitudes(const typename V::A* x, int64_t rows, int64_t stride, int64_t n,
                    typename V::A* total) {
  using A = typename V::A;
  int64_t t = 0;
  for (; t + V::kWidth <= n; t += V::kWidth) {
    V sum = V::set1(A(0));
    for (int64_t r = 0; r < rows; ++r) sum = sum + V::abs(V::load(x + r * stride + t));
    (V::load(total + t) + sum).store(total + t);
  }
  for (; t < n; ++t) {
    A sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const A v = x[r * stride + t];
      sum += v < 0 ? -v : v;
    }
    total[t] += sum;
  }
}

template <class V>
void score(const typename V::A* z, const typename V::A* effect, const typename V::A* base,
           int64_t n, typename V::A* out) {
  using A = typename V::A;
  int64_t t = 0;
  for (; t + V::kWidth <= n; t += V::kWidth) {
    const V positive = V::max(V::set1(A(0)), V::load(z + t));  // a NaN stays a NaN
    (positive * (V::load(base + t) + V::abs(V::load(effect + t)))).store(out + t);
  }
  for (; t < n; ++t) {
    out[t] = (z[t] < 0 ? A(0) : z[t]) * (base[t] + (effect[t] < 0 ? -effect[t] : effect[t]));
  }
}

template <class V>
typename V::A sum_positive(const typename V::A* x, int64_t n, bool squares) {
  using A = typename V::A;
  V sums[4];
  for (int u = 0; u < 4; ++u) sums[u] = V::set1(A(0));
  const V zero = V::set1(A(0));
  int64_t t = 0;
  for (; t + 4 * V::kWidth <= n; t += 4 * V::kWidth) {
    for (int u = 0; u < 4; ++u) {
      const V v = V::max(zero, V::load(x + t + u * V::kWidth));
      sums[u] = squares ? V::fma(v, v, sums[u]) : sums[u] + v;
    }
  }
  A sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
  for (; t < n; ++t) {
    const A v = x[t] < 0 ? A(0) : x[t];
    sum += squares ? v * v : v;
  }
  return sum;
}

// log x of a positive, normal x, to about 1 ulp; without a branch, so that the compiler makes
// vectors of it. The polynomial is that of Cephes' logf.
static inline float log_of(float x) {
  const int32_t exponent = static_cast<int32_t>(float_to_bits(x) - 0x3f3504f3u) >> 23;
  const float e = static_cast<float>(exponent);
  const float m = bits_to_float(float_to_bits(x) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * m * m - 2.12194440e-4f * e - 0.5f * m * m;
  return m + y + 0.693359375f * e;
}
static inline double log_of(double x) {
  return __builtin_log(x);
}

template <class V>
typename V::A sum_log(const typename V::A* x, int64_t n) {
  using A = typename V::A;
  constexpr int64_t kBlock = 64;
  const V zero = V::set1(A(0)), one = V::set1(A(1));
  V sum = zero;
  A rest = 0;
  int64_t t = 0;
  for (; t + kBlock <= n; t += kBlock) {
    A numbers[kBlock], logs[kBlock];
    for (int64_t i = 0; i < kBlock; i += V::kWidth) {
      const V v = V::load(x + t + i);
      V::select(V::above(v, zero), v, one).store(numbers + i);  // log 1 = 0
    }
    for (int64_t i = 0; i < kBlock; ++i) logs[i] = log_of(numbers[i]);
    for (int64_t i = 0; i < kBlock; i += V::kWidth) {
      sum = V::fma(V::load(numbers + i), V::load(logs + i), sum);
    }
  }
  for (; t < n; ++t) rest += x[t] > A(0) ? x[t] * log_of(x[t]) : A(0);
  return sum.sum() + rest;
}

template <class V>
constexpr LatentKernels<typename V::A> kLatentTable{max_rows<V>, add_magnitudes<V>, score<V>,
                                                    sum_positive<V>, sum_log<V>};

}  // namespace
}  // namespace fastsae::cpu
