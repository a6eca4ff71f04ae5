// The exact k largest entries of one row: a lower bound from group maxima, a filter of the chunks
// whose own maxima reach it, and a selection among the few candidates that are left.
//
// Order: NaN largest, -0 equal to +0, then the lowest index. Candidates are found in ascending
// index order and kept in it, so no sort is needed for the default output order.
// Cost: the row is read once, of a long one about 8 k vectors again, from L2, plus O(candidates).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace fastsae::cpu {

template <class A>
struct RowScratch {
  std::vector<A> values;         // candidates, ascending index
  std::vector<int32_t> indices;  // the same
  std::vector<A> maxima;
  std::vector<decltype(order_key(A(0)))> keys;
  int64_t count = 0;

  void reserve(size_t candidates, size_t groups) {
    if (values.size() < candidates) {
      values.resize(candidates);
      indices.resize(candidates);
    }
    if (maxima.size() < groups) maxima.resize(groups);
    if (keys.size() < std::max(candidates, groups)) keys.resize(std::max(candidates, groups));
  }
};

// Leaves exactly k candidates in `s`, ascending index. 1 <= k <= n.
template <class T>
void select_row(const Kernels<T>& kernel, const T* x, const Acc<T>* bias, int64_t n, int64_t k,
                RowScratch<Acc<T>>& s) {
  using A = Acc<T>;
  constexpr A kInf = std::numeric_limits<A>::infinity();
  constexpr int64_t kBlock = 4096;        // entries filtered between two looks at the buffer
  constexpr int64_t kMinCapacity = 8192;  // candidates held before the bound is tightened
  const int64_t capacity = std::max<int64_t>(kMinCapacity, 2 * k);
  const int64_t groups = (4 * k + 63) / 64 * 64;
  s.reserve(static_cast<size_t>(capacity + kBlock + 64), static_cast<size_t>(groups + n / 8));

  // NaN lets everything through: for k too near n, and for rows of -inf, there is no useful bound.
  A lower_bound = std::numeric_limits<A>::quiet_NaN();
  A* const maxima = s.maxima.data() + groups;
  int64_t chunked = 0;  // entries whose maxima are known
  if (groups * 2 <= n) {
    if (groups * 64 <= n) {  // below, most chunks hold a candidate
      const int64_t count = kernel.lane_max(x, bias, n, maxima);
      kernels<A>().group_max(maxima, nullptr, count, groups, s.maxima.data());
      chunked = 8 * count;
    } else {
      kernel.group_max(x, bias, n, groups, s.maxima.data());
    }
    const A bound = kernel.kth_bound(s.maxima.data(), groups, k, s.keys.data());
    // Entries equal to the bound belong: the filter is strict, so it gets the number below.
    if (bound > -kInf) lower_bound = std::nextafter(bound, -kInf);
  }

  s.count = 0;
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t size = std::min(kBlock, n - j);
    const int64_t known = std::clamp<int64_t>(chunked - j, 0, size);
    s.count += kernel.filter_chunks(x + j, bias ? bias + j : nullptr, known / 8, maxima + j / 8,
                                    &lower_bound, static_cast<int32_t>(j),
                                    s.values.data() + s.count, s.indices.data() + s.count);
    s.count += kernel.filter(x + j + known, bias ? bias + j + known : nullptr, size - known,
                             &lower_bound, false, Pass::kNotBelow, static_cast<int32_t>(j + known),
                             s.values.data() + s.count, s.indices.data() + s.count);
    if (s.count > capacity) {
      // What comes later and equals the k-th value has a higher index and loses: strict is right.
      lower_bound =
          kernel.keep_largest(s.values.data(), s.indices.data(), s.count, k, s.keys.data());
      s.count = k;
      if (std::isnan(lower_bound)) break;  // k NaNs: nothing later can win
    }
  }
  if (s.count > k) {
    kernel.keep_largest(s.values.data(), s.indices.data(), s.count, k, s.keys.data());
  }
  s.count = k;
}

// Reorders the k candidates by descending value, lowest index first among equals.
template <class A>
void sort_descending(RowScratch<A>& s) {
  std::vector<std::pair<A, int32_t>> pairs(static_cast<size_t>(s.count));
  for (int64_t j = 0; j < s.count; ++j) pairs[j] = {s.values[j], s.indices[j]};
  std::stable_sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) {
    return order_key(a.first) > order_key(b.first);
  });
  for (int64_t j = 0; j < s.count; ++j) std::tie(s.values[j], s.indices[j]) = pairs[j];
}

}  // namespace fastsae::cpu
