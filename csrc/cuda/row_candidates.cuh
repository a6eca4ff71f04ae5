// A row's list of candidates as device code sees it: how an entry is encoded, how a list is
// tightened to its k largest, and how these are taken at the end. Called by whole blocks.
//
// An entry is one 64-bit number: the key of what is compared (the value or its magnitude), the
// complement of the column in 31 bits, and the sign of the value, which a key does not tell of a
// zero or a magnitude. The larger one wins, so ties go to the lowest column, and since no two are
// equal, the order in which entries were appended changes nothing.
#pragma once

#include "cuda/row_candidates.h"
#include "cuda/take_largest.cuh"

namespace fastsae::cuda {

__device__ __forceinline__ uint64_t row_candidate(uint32_t key, int column, bool negative) {
  const uint32_t place = ~static_cast<uint32_t>(column) << 1 | (negative ? 1u : 0u);
  return static_cast<uint64_t>(key) << 32 | place;
}
__device__ __forceinline__ uint32_t key_of(uint64_t entry) {
  return static_cast<uint32_t>(entry >> 32);
}
__device__ __forceinline__ int column_of(uint64_t entry) {
  return static_cast<int>(~(static_cast<uint32_t>(entry) >> 1) & 0x7fffffffu);
}
// The value, whether it was compared or its magnitude; of NaN, one.
__device__ __forceinline__ float value_of(uint64_t entry) {
  const uint32_t magnitude = Float32::from_key(key_of(entry)) & ~Float32::kSign;
  return Float32::widen(magnitude | static_cast<uint32_t>(entry) << 31);
}

// The bound that an entry is: +inf in place of NaN, which is not below itself.
__device__ __forceinline__ float bound_of(uint32_t key) {
  constexpr uint32_t kPlusInf = Float32::kSign | Float32::kInf;  // its key
  return Float32::widen(Float32::from_key(key > kPlusInf ? kPlusInf : key));
}
// The next larger number, of +inf itself. An element to the right of k that reach the bound has to
// reach this: one that equals the bound loses the tie.
__device__ __forceinline__ float just_above(float bound) {
  return bound_of(Float32::key(Float32::narrow(bound)) + 1);
}

// Shared memory of a list's selection: `entries` and `winners`, see take_largest.
struct ListSpace {
  SelectSpace select;
  unsigned least;  // key of the smallest that was taken
};

// Makes the k largest of `count` entries in shared memory the whole list of row r, and the smallest
// of them its bound. Ends with a barrier.
template <int kThreads, bool kRanked>
__device__ __forceinline__ void tighten_row(const RowCandidates& kept, int64_t r, uint64_t* entries,
                                            int count, int k, uint64_t* winners, int size,
                                            ListSpace& s) {
  uint64_t* list = kept.entries + r * kept.capacity;
  if (threadIdx.x == 0) {
    s.select.winner_count = 0;
    s.least = ~0u;
  }
  __syncthreads();  // entries, list and counters are as they are read below
  take_largest<kThreads, kRanked>(entries, count, k, Order::kAny, winners, size, s.select,
                                  [&](int place, uint64_t entry) {
                                    list[place] = entry;
                                    atomicMin(&s.least, key_of(entry));
                                  });
  __syncthreads();  // all are taken before the smallest is read
  if (threadIdx.x == 0) {
    kept.count[r] = static_cast<uint32_t>(k);
    kept.bound[r] = bound_of(s.least);
  }
}

// Writes the k largest of row r's list, which lies in shared memory, in ascending column.
template <int kThreads, bool kRanked>
__device__ __forceinline__ void choose_row(const ChooseRowsParams& p, int64_t r, uint64_t* entries,
                                           int count, uint64_t* winners, int size, ListSpace& s) {
  if (threadIdx.x == 0) s.select.winner_count = 0;
  __syncthreads();  // the entries are there, and the counter is zero
  take_largest<kThreads, kRanked>(entries, count, p.k, Order::kByIndex, winners, size, s.select,
                                  [&](int place, uint64_t entry) {
                                    const int column = column_of(entry);
                                    float value = value_of(entry);
                                    if ((p.mask && !p.mask[column]) || (p.relu && value <= 0))
                                      value = 0;
                                    p.values[r * p.k + place] = value;
                                    p.indices[r * p.k + place] = column;
                                  });
}

}  // namespace fastsae::cuda
