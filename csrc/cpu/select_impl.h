// The k largest of a list of candidates, and a bound that k of them reach.
//
// Values become integers that order alike, and the range of those is halved by counting how many
// reach its middle: a vector compare and a popcount each, where a partial sort moves and branches.
// It ends as soon as exactly k reach the middle: for distinct values after about log2(n) + 5
// rounds.
#pragma once

#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

static inline int32_t key_max(int32_t) {
  return INT32_MAX;
}
static inline int64_t key_max(int64_t) {
  return INT64_MAX;
}
static inline float key_value(int32_t key) {
  return bits_to_float(static_cast<uint32_t>(key ^ ((key >> 31) & INT32_MAX)));
}
static inline double key_value(int64_t key) {
  const int64_t bits = key ^ ((key >> 63) & INT64_MAX);
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class V>
inline void make_keys(const typename V::A* values, int64_t n, typename V::Key* keys) {
  int64_t j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) V::load(values + j).store_keys(keys + j);
  for (; j < n; ++j) keys[j] = order_key(values[j]);
}

template <class V>
inline int64_t count_at_least(const typename V::Key* keys, int64_t n, typename V::Key bound) {
  int64_t count = 0, j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) {
    count += __builtin_popcount(V::at_least(keys + j, bound));
  }
  for (; j < n; ++j) count += keys[j] >= bound;
  return count;
}

// The largest bound found that at least k keys reach; `*reach` says how many do. If that is not k,
// the bound is the k-th largest key itself, with ties.
template <class V>
inline typename V::Key bisect(const typename V::Key* keys, int64_t n, int64_t k, int64_t* reach) {
  using Key = typename V::Key;
  Key low = keys[0], high = keys[0];
  for (int64_t j = 1; j < n; ++j) {
    low = keys[j] < low ? keys[j] : low;
    high = keys[j] > high ? keys[j] : high;
  }
  *reach = n;
  while (low < high && *reach != k) {
    const Key middle = (low | high) - ((low ^ high) >> 1);  // the average, rounded up
    const int64_t count = count_at_least<V>(keys, n, middle);
    if (count >= k) {
      low = middle;
      *reach = count;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <class V>
typename V::A kth_bound(const typename V::A* values, int64_t n, int64_t k, typename V::Key* keys) {
  make_keys<V>(values, n, keys);
  int64_t reach;
  return key_value(bisect<V>(keys, n, k, &reach));
}

template <class V>
typename V::A keep_largest(typename V::A* values, int32_t* indices, int64_t n, int64_t k,
                           typename V::Key* keys) {
  using Key = typename V::Key;
  make_keys<V>(values, n, keys);
  int64_t reach;
  const Key bound = bisect<V>(keys, n, k, &reach);
  // Of the entries at the bound itself the first ones stay; with reach == k all of them do.
  int64_t ties = k;
  if (reach != k) ties -= bound == key_max(bound) ? 0 : count_at_least<V>(keys, n, bound + 1);
  Key least = key_max(bound);
  int64_t m = 0;
  const auto keep = [&](int64_t j) {
    if (keys[j] == bound && ties-- <= 0) return;
    least = keys[j] < least ? keys[j] : least;
    values[m] = values[j];
    indices[m++] = indices[j];
  };
  int64_t j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) {
    for (unsigned mask = V::at_least(keys + j, bound); mask; mask &= mask - 1) {
      keep(j + __builtin_ctz(mask));
    }
  }
  for (; j < n; ++j) {
    if (keys[j] >= bound) keep(j);
  }
  return key_value(least);
}

}  // namespace
}  // namespace fastsae::cpu
