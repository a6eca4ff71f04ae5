// One pass over a row: maxima of interleaved groups, and the entries that pass a threshold.
//
// Both read each element once, 64 bytes at a time: at the limit of L2, and of memory when the row
// does not fit there. The k-th largest of `groups` maxima is a lower bound of the k-th largest
// element, because k different elements reach it; with groups >= 4k it is a tight one. Of a long
// row the maxima of short chunks are kept as well, and chunks that cannot hold an entry that passes
// are not read again.
#pragma once

#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

constexpr int kChunk = 8;  // vectors whose lanes' maxima say whether any of their entries pass

template <class V, bool kBias, class T>
inline V load_sum(const T* x, const typename V::A* bias, int64_t j) {
  V v = V::load(x + j);
  if constexpr (kBias) v = v + V::load(bias + j);
  return v;
}

// Maxima of groups [g, g + kStrip * kWidth), in registers while the whole row goes by.
template <class V, bool kBias, int kStrip, class T>
inline void group_max_strip(const T* x, const typename V::A* bias, int64_t n, int64_t groups,
                            int64_t g, typename V::A* out) {
  V best[kStrip];
  for (int r = 0; r < kStrip; ++r) best[r] = V::load(out + g + r * V::kWidth);
  for (int64_t j = g; j + kStrip * V::kWidth <= n; j += groups) {
    for (int r = 0; r < kStrip; ++r) {
      best[r] = V::max(load_sum<V, kBias>(x, bias, j + r * V::kWidth), best[r]);
    }
  }
  for (int r = 0; r < kStrip; ++r) best[r].store(out + g + r * V::kWidth);
}

template <class V, bool kBias, class T>
void group_max_loop(const T* x, const typename V::A* bias, int64_t n, int64_t groups,
                    typename V::A* out) {
  using A = typename V::A;
  constexpr int kStrip = V::kAccumulators >= 16 ? 16 : 8;
  for (int64_t g = 0; g < groups; ++g) out[g] = static_cast<A>(-__builtin_inf());
  int64_t g = 0;
  const int64_t whole = n / groups * groups;
  for (; g + kStrip * V::kWidth <= groups; g += kStrip * V::kWidth) {
    group_max_strip<V, kBias, kStrip>(x, bias, whole, groups, g, out);
  }
  for (; g + 8 * V::kWidth <= groups; g += 8 * V::kWidth) {
    group_max_strip<V, kBias, 8>(x, bias, whole, groups, g, out);
  }
  for (; g < groups; g += V::kWidth) {
    group_max_strip<V, kBias, 1>(x, bias, whole, groups, g, out);
  }
  for (int64_t j = whole; j < n; ++j) {
    const A v = kBias ? widen(x[j]) + bias[j] : widen(x[j]);  // -0 stays -0
    if (v > out[j - whole]) out[j - whole] = v;
  }
}

template <class V, class T>
void group_max(const T* x, const typename V::A* bias, int64_t n, int64_t groups,
               typename V::A* out) {
  if (bias) group_max_loop<V, true>(x, bias, n, groups, out);
  else group_max_loop<V, false>(x, bias, n, groups, out);
}

template <class V, class T>
void widen_max(const T* x, int64_t n, typename V::A* out, typename V::A* best) {
  int64_t j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) {
    const V v = V::load(x + j);
    v.store(out + j);
    V::max(v, V::load(best + j)).store(best + j);
  }
  for (; j < n; ++j) {
    out[j] = widen(x[j]);
    if (out[j] > best[j]) best[j] = out[j];
  }
}

constexpr int kFilterUnroll = 4;

// The elements below n, a multiple of kFilterUnroll vectors.
template <class V, bool kBias, bool kPerColumn, Pass kPass, class T>
int64_t filter_vectors(const T* x, const typename V::A* bias, int64_t n,
                       const typename V::A* lower_bound, int32_t base, typename V::A* values,
                       int32_t* indices) {
  using A = typename V::A;
  const V one_bound = V::set1(kPerColumn ? A(0) : lower_bound[0]);
  const auto passing = [&](V v, int64_t j) {
    const V t = kPerColumn ? V::load(lower_bound + j) : one_bound;
    return kPass == Pass::kAbove ? V::above(v, t) : V::not_below_or_equal(v, t);
  };
  int64_t m = 0;
  for (int64_t j = 0; j < n; j += kFilterUnroll * V::kWidth) {
    V v[kFilterUnroll];
    typename V::Mask mask[kFilterUnroll];
    for (int u = 0; u < kFilterUnroll; ++u) {
      const int64_t at = j + u * V::kWidth;
      v[u] = load_sum<V, kBias>(x, bias, at);
      mask[u] = passing(v[u], at);
    }
    if (__builtin_expect(V::none(mask[0], mask[1], mask[2], mask[3]), 1)) continue;
    // No branch for each vector: which of them hold the few that pass is not predictable.
    for (int u = 0; u < kFilterUnroll; ++u) {
      const unsigned bits = V::bits(mask[u]);
      const int32_t at = base + static_cast<int32_t>(j) + u * V::kWidth;
      m += V::compress(v[u], bits, at, values + m, indices + m);
    }
  }
  return m;
}

template <class V, bool kBias, bool kPerColumn, Pass kPass, class T>
int64_t filter_loop(const T* x, const typename V::A* bias, int64_t n,
                    const typename V::A* lower_bound, int32_t base, typename V::A* values,
                    int32_t* indices) {
  using A = typename V::A;
  int64_t j = n - n % (kFilterUnroll * V::kWidth);
  int64_t m =
      filter_vectors<V, kBias, kPerColumn, kPass>(x, bias, j, lower_bound, base, values, indices);
  for (; j < n; ++j) {
    const A v = kBias ? widen(x[j]) + bias[j] : widen(x[j]);  // -0 stays -0
    const A t = lower_bound[kPerColumn ? j : 0];
    if (kPass == Pass::kAbove ? v > t : !(v <= t)) {
      values[m] = v;
      indices[m++] = base + static_cast<int32_t>(j);
    }
  }
  return m;
}

// Maxima of the lanes of a chunk, NaN where a lane has one (or infinities of both signs, which add
// up to it).
template <class V, bool kBias, class T>
inline void lane_max_of(const T* x, const typename V::A* bias, int64_t chunk,
                        typename V::A* maxima) {
  const int64_t j = chunk * kChunk * V::kWidth;
  V best = load_sum<V, kBias>(x, bias, j), sum = best;
  for (int u = 1; u < kChunk; ++u) {
    const V v = load_sum<V, kBias>(x, bias, j + u * V::kWidth);
    best = V::max(v, best);
    sum = sum + v;
  }
  V::select(V::not_below_or_equal(sum, sum), sum, best).store(maxima + chunk * V::kWidth);
}

// The row is read in four places at once: a core gets a third more from memory than in one.
template <class V, bool kBias, class T>
inline void lane_max_loop(const T* x, const typename V::A* bias, int64_t chunks,
                          typename V::A* maxima) {
  constexpr int kStreams = 4;
  const int64_t part = chunks / kStreams;
  for (int64_t c = 0; c < part; ++c) {
    for (int s = 0; s < kStreams; ++s) lane_max_of<V, kBias>(x, bias, c + s * part, maxima);
  }
  for (int64_t c = kStreams * part; c < chunks; ++c) lane_max_of<V, kBias>(x, bias, c, maxima);
}

template <class V, class T>
int64_t lane_max(const T* x, const typename V::A* bias, int64_t n, typename V::A* maxima) {
  const int64_t chunks = n / (kChunk * V::kWidth);
  if (bias) lane_max_loop<V, true>(x, bias, chunks, maxima);
  else lane_max_loop<V, false>(x, bias, chunks, maxima);
  return chunks * V::kWidth;
}

template <class V, class T>
int64_t filter_chunks(const T* x, const typename V::A* bias, int64_t count,
                      const typename V::A* maxima, const typename V::A* lower_bound, int32_t base,
                      typename V::A* values, int32_t* indices) {
  constexpr int64_t kSize = kChunk * V::kWidth;
  static_assert(kChunk % kFilterUnroll == 0);
  const V bound = V::set1(*lower_bound);
  int64_t m = 0;
  for (int64_t c = 0; c < count / V::kWidth; ++c) {
    const auto mask = V::not_below_or_equal(V::load(maxima + c * V::kWidth), bound);
    if (__builtin_expect(V::bits(mask) == 0, 1)) continue;
    const int64_t j = c * kSize;
    const int32_t at = base + static_cast<int32_t>(j);
    m += bias ? filter_vectors<V, true, false, Pass::kNotBelow>(x + j, bias + j, kSize, lower_bound,
                                                                at, values + m, indices + m)
              : filter_vectors<V, false, false, Pass::kNotBelow>(x + j, nullptr, kSize, lower_bound,
                                                                 at, values + m, indices + m);
  }
  return m;
}

template <class V, bool kBias, class T>
int64_t filter_with(const T* x, const typename V::A* bias, int64_t n,
                    const typename V::A* lower_bound, bool per_column, Pass pass, int32_t base,
                    typename V::A* values, int32_t* indices) {
  if (per_column && pass == Pass::kAbove) {
    return filter_loop<V, kBias, true, Pass::kAbove>(x, bias, n, lower_bound, base, values,
                                                     indices);
  }
  if (per_column) {
    return filter_loop<V, kBias, true, Pass::kNotBelow>(x, bias, n, lower_bound, base, values,
                                                        indices);
  }
  if (pass == Pass::kAbove) {
    return filter_loop<V, kBias, false, Pass::kAbove>(x, bias, n, lower_bound, base, values,
                                                      indices);
  }
  return filter_loop<V, kBias, false, Pass::kNotBelow>(x, bias, n, lower_bound, base, values,
                                                       indices);
}

template <class V, class T>
int64_t filter(const T* x, const typename V::A* bias, int64_t n, const typename V::A* lower_bound,
               bool per_column, Pass pass, int32_t base, typename V::A* values, int32_t* indices) {
  return bias ? filter_with<V, true>(x, bias, n, lower_bound, per_column, pass, base, values,
                                     indices)
              : filter_with<V, false>(x, bias, n, lower_bound, per_column, pass, base, values,
                                      indices);
}

}  // namespace
}  // namespace fastsae::cpu
