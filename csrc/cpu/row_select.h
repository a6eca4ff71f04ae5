// The exact k largest entries of one row: a lower bound from group maxima, one filtering pass, and
// a selection among the few candidates that are left.
//
// Order: NaN largest, -0 equal to +0, then the lowest index. Candidates are found in ascending
// index order and kept in it, so no sort is needed for the default output order.
// Cost: the row is read once from memory (the second time it is in L2), plus O(candidates).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"

namespace fastsae::cpu {

// A key that orders like (value, lower index first): larger key wins, no two keys are equal.
inline uint64_t order_key(float value, int32_t index) {
  uint32_t u = float_to_bits(value + 0.0f);  // -0 + 0 = +0
  u = std::isnan(value) ? 0xffffffffu : u ^ ((u >> 31) ? 0xffffffffu : 0x80000000u);
  return (static_cast<uint64_t>(u) << 32) | (0xffffffffu - static_cast<uint32_t>(index));
}
inline unsigned __int128 order_key(double value, int32_t index) {
  const double canonical = value + 0.0;
  uint64_t u;
  memcpy(&u, &canonical, sizeof u);
  u = std::isnan(value) ? ~uint64_t{0} : u ^ ((u >> 63) ? ~uint64_t{0} : uint64_t{1} << 63);
  return (static_cast<unsigned __int128>(u) << 32) | (0xffffffffu - static_cast<uint32_t>(index));
}
inline int32_t key_index(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}
inline int32_t key_index(unsigned __int128 key) {
  return key_index(static_cast<uint64_t>(key));
}

template <class A>
struct RowScratch {
  using Key = decltype(order_key(A(0), 0));
  std::vector<A> values;         // candidates, ascending index
  std::vector<int32_t> indices;  // the same
  std::vector<A> maxima;
  std::vector<Key> keys;
  int64_t count = 0;

  // Keeps the k largest candidates in place; returns the value of the smallest of them.
  A keep_largest(int64_t k) {
    keys.resize(static_cast<size_t>(count));
    for (int64_t j = 0; j < count; ++j) keys[j] = order_key(values[j], indices[j]);
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
    const Key cut = keys[k - 1];
    A smallest = A(0);
    int64_t m = 0;
    for (int64_t j = 0; j < count; ++j) {
      const Key key = order_key(values[j], indices[j]);
      if (key < cut) continue;
      if (key == cut) smallest = values[j];
      values[m] = values[j];
      indices[m++] = indices[j];
    }
    count = m;
    return smallest;
  }
};

// Leaves exactly k candidates in `s`, ascending index. 1 <= k <= n.
template <class T>
void select_row(const Kernels<T>& kernel, const T* x, const Acc<T>* bias, int64_t n, int64_t k,
                RowScratch<Acc<T>>& s) {
  using A = Acc<T>;
  constexpr A kInf = std::numeric_limits<A>::infinity();
  constexpr int64_t kBlock = 4096;   // entries filtered between two looks at the buffer
  constexpr int64_t kMinCap = 8192;  // candidates held before the bound is tightened
  const int64_t cap = std::max<int64_t>(kMinCap, 2 * k);
  const size_t room = static_cast<size_t>(cap + kBlock + 64);
  if (s.values.size() < room) {
    s.values.resize(room);
    s.indices.resize(room);
  }

  // NaN lets everything through: for k too near n, and for rows of -inf, there is no useful bound.
  A tau = std::numeric_limits<A>::quiet_NaN();
  const int64_t groups = (4 * k + 63) / 64 * 64;
  if (groups * 2 <= n) {
    s.maxima.resize(static_cast<size_t>(groups));
    kernel.group_max(x, bias, n, groups, s.maxima.data());
    std::nth_element(s.maxima.begin(), s.maxima.begin() + (k - 1), s.maxima.end(),
                     std::greater<>());
    // Entries equal to the bound belong: the filter is strict, so it gets the number below.
    if (s.maxima[k - 1] > -kInf) tau = std::nextafter(s.maxima[k - 1], -kInf);
  }

  s.count = 0;
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t size = std::min(kBlock, n - j);
    s.count += kernel.filter(x + j, bias ? bias + j : nullptr, size, &tau, false, Pass::kNotBelow,
                             static_cast<int32_t>(j), s.values.data() + s.count,
                             s.indices.data() + s.count);
    if (s.count > cap) {
      // What comes later and equals the k-th value has a higher index and loses: strict is right.
      tau = s.keep_largest(k);
      if (std::isnan(tau)) break;  // k NaNs: nothing later can win
    }
  }
  if (s.count > k) s.keep_largest(k);
}

// Reorders the candidates by descending value, lowest index first among equals.
template <class A>
void sort_descending(RowScratch<A>& s) {
  s.keys.resize(static_cast<size_t>(s.count));
  for (int64_t j = 0; j < s.count; ++j) s.keys[j] = order_key(s.values[j], s.indices[j]);
  std::sort(s.keys.begin(), s.keys.end(), std::greater<>());
  std::vector<A> by_index(s.values.begin(), s.values.begin() + s.count);
  std::vector<int32_t> indices(s.indices.begin(), s.indices.begin() + s.count);
  for (int64_t j = 0; j < s.count; ++j) {
    const int32_t index = key_index(s.keys[j]);
    const auto at = std::lower_bound(indices.begin(), indices.end(), index) - indices.begin();
    s.values[j] = by_index[at];
    s.indices[j] = index;
  }
}

}  // namespace fastsae::cpu
