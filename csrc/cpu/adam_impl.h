// What an Adam step does with one row of a matrix while it is in the first-level cache.
//
//   m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g^2
//   p <- p - step_size m / (sqrt(v) / sqrt(1 - beta2^t) + eps),  step_size = lr / (1 - beta1^t)
//
// as torch.optim.Adam computes it (Kingma & Ba 2015, algorithm 1), or with the row's mean of g^2
// and one v for the row (Adam-mini, Zhang et al. 2024). Sums over a row run in a fixed order, so
// they depend on the instruction set at most.
#pragma once

#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

template <class V>
typename V::A row_dot(const typename V::A* a, const typename V::A* b, int64_t d) {
  using A = typename V::A;
  V sum[4] = {V::set1(A(0)), V::set1(A(0)), V::set1(A(0)), V::set1(A(0))};
  int64_t c = 0;
  for (; c + 4 * V::kWidth <= d; c += 4 * V::kWidth) {
    for (int i = 0; i < 4; ++i) {
      const int64_t o = c + i * V::kWidth;
      sum[i] = V::fma(V::load(a + o), V::load(b + o), sum[i]);
    }
  }
  for (; c + V::kWidth <= d; c += V::kWidth)
    sum[0] = V::fma(V::load(a + c), V::load(b + c), sum[0]);
  A total = ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
  for (; c < d; ++c) total += a[c] * b[c];
  return total;
}

template <class V>
void add_scaled(typename V::A* y, const typename V::A* x, typename V::A a, int64_t d) {
  const V scale = V::set1(a);
  int64_t c = 0;
  for (; c + V::kWidth <= d; c += V::kWidth) {
    V::fma(scale, V::load(x + c), V::load(y + c)).store(y + c);
  }
  for (; c < d; ++c) y[c] += a * x[c];
}

template <class V>
void scale_row(typename V::A* x, typename V::A a, int64_t d) {
  const V scale = V::set1(a);
  int64_t c = 0;
  for (; c + V::kWidth <= d; c += V::kWidth) (scale * V::load(x + c)).store(x + c);
  for (; c < d; ++c) x[c] *= a;
}

template <class V>
void narrow_row(const typename V::A* x, int64_t d, bf16* out) {
  int64_t c = 0;
  if constexpr (sizeof(typename V::A) == sizeof(float)) {
    for (; c + V::kWidth <= d; c += V::kWidth) V::load(x + c).store(out + c);
  }
  for (; c < d; ++c) out[c] = narrow<bf16>(static_cast<float>(x[c]));
}

// T: what averages are stored as, A or bf16. The latter are rounded by the bits of column `c`.
template <class V, class T>
inline V adam_update(V g, typename V::A* p, T* m, T* v, const AdamConstants<typename V::A>& s,
                     DitherKey key, int64_t c) {
  const V old = V::load(m);
  const V mean = V::fma(V::set1(s.one_minus_beta1), g - old, old);
  const V square = V::fma(V::set1(s.one_minus_beta2), g * g, V::set1(s.beta2) * V::load(v));
  const V denominator = V::fma(V::sqrt(square), V::set1(s.inverse_correction2), V::set1(s.eps));
  const V moved = V::load(p) - V::set1(s.step_size) * (mean / denominator);
  if constexpr (sizeof(T) == sizeof(bf16)) {
    const typename V::Noise noise = V::noise(key, static_cast<uint32_t>(c));
    mean.store_dithered(m, noise);
    square.store_dithered(v, V::upper(noise));
  } else {
    mean.store(m);
    square.store(v);
  }
  moved.store(p);
  return moved;
}

template <class V, class T>
typename V::A adam_row_of(typename V::A* p, T* m, T* v, const typename V::A* g, typename V::A scale,
                          int64_t d, const AdamConstants<typename V::A>& s, DitherKey key) {
  using A = typename V::A;
  const V zero = V::set1(A(0)), factor = V::set1(scale);
  V sum = zero;
  int64_t c = 0;
  for (; c + V::kWidth <= d; c += V::kWidth) {
    // The next row of each, which the gathers between two rows would keep from being fetched.
    prefetch(p + c + d);
    prefetch(m + c + d);
    prefetch(v + c + d);
    const V gradient = g ? factor * V::load(g + c) : zero;
    const V moved = adam_update<V>(gradient, p + c, m + c, v + c, s, key, c);
    sum = V::fma(moved, moved, sum);
  }
  A total = sum.sum();
  if (c < d) {
    // The rest of the row as one vector, filled up with zeros, which stay zeros.
    const size_t count = static_cast<size_t>(d - c), bytes = sizeof(A) * count;
    A rest[2][V::kWidth] = {};
    T averages[2][V::kWidth] = {};
    memcpy(rest[0], p + c, bytes);
    if (g) memcpy(rest[1], g + c, bytes);
    memcpy(averages[0], m + c, sizeof(T) * count);
    memcpy(averages[1], v + c, sizeof(T) * count);
    const V moved =
        adam_update<V>(factor * V::load(rest[1]), rest[0], averages[0], averages[1], s, key, c);
    total += (moved * moved).sum();
    memcpy(p + c, rest[0], bytes);
    memcpy(m + c, averages[0], sizeof(T) * count);
    memcpy(v + c, averages[1], sizeof(T) * count);
  }
  return total;
}

template <class V>
typename V::A adam_row(typename V::A* p, typename V::A* m, typename V::A* v, const typename V::A* g,
                       typename V::A scale, int64_t d, const AdamConstants<typename V::A>& s) {
  return adam_row_of<V>(p, m, v, g, scale, d, s, DitherKey{});
}

template <class V>
typename V::A adam_mini_row(typename V::A* p, typename V::A* m, typename V::A* v,
                            const typename V::A* g, typename V::A scale, int64_t d,
                            const AdamConstants<typename V::A>& s) {
  using A = typename V::A;
  const A square = g ? scale * scale * (row_dot<V>(g, g, d) / static_cast<A>(d ? d : 1)) : A(0);
  *v = s.beta2 * *v + s.one_minus_beta2 * square;
  const V root = V::fma(V::sqrt(V::set1(*v)), V::set1(s.inverse_correction2), V::set1(s.eps));
  const V step = V::set1(-s.step_size) / root, rate = V::set1(s.one_minus_beta1);
  const V zero = V::set1(A(0)), factor = V::set1(scale);
  const auto move = [&](V gradient, A* at, A* mean_at) {
    const V old = V::load(mean_at), mean = V::fma(rate, gradient - old, old);
    const V moved = V::fma(step, mean, V::load(at));
    mean.store(mean_at);
    moved.store(at);
    return moved;
  };
  V sum = zero;
  int64_t c = 0;
  for (; c + V::kWidth <= d; c += V::kWidth) {
    prefetch(p + c + d);
    prefetch(m + c + d);
    const V moved = move(g ? factor * V::load(g + c) : zero, p + c, m + c);
    sum = V::fma(moved, moved, sum);
  }
  A total = sum.sum();
  if (c < d) {
    const size_t bytes = sizeof(A) * static_cast<size_t>(d - c);
    A rest[3][V::kWidth] = {};
    memcpy(rest[0], p + c, bytes);
    memcpy(rest[1], m + c, bytes);
    if (g) memcpy(rest[2], g + c, bytes);
    const V moved = move(factor * V::load(rest[2]), rest[0], rest[1]);
    total += (moved * moved).sum();
    memcpy(p + c, rest[0], bytes);
    memcpy(m + c, rest[1], bytes);
  }
  return total;
}

template <class V>
constexpr auto adam_row_bf16() {
  if constexpr (sizeof(typename V::A) == sizeof(float)) return adam_row_of<V, bf16>;
  else return nullptr;
}

template <class V>
constexpr AdamKernels<typename V::A> kAdamTable{row_dot<V>,      add_scaled<V>, scale_row<V>,
                                                narrow_row<V>,   adam_row<V>,   adam_row_bf16<V>(),
                                                adam_mini_row<V>};

}  // namespace
}  // namespace fastsae::cpu
