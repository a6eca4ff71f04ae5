// The largest of the candidates in shared memory, in the order that is asked for.
#pragma once

#include "cuda/row_select.cuh"

namespace fastsae::cuda {

constexpr int kMostRanked = 128;  // the largest k whose candidates are ordered by counting
constexpr int kSpare = 96;        // candidates more than k that are not worth another digit

// The order in which candidates are taken.
enum class Order { kAny, kByValue, kByIndex };

// How many of the list are larger than c.
__device__ __forceinline__ int count_above(uint64_t c, const uint64_t* list, int size) {
  int above = 0;
#pragma unroll 8
  for (int i = 0; i < size; ++i) above += list[i] > c ? 1 : 0;
  return above;
}

// Takes the `need` largest of `count` candidates: take(place, candidate). Uses up `candidates` and
// `winners`. Where k is small (kRanked), digits are settled until few more than k remain, and the
// place of each is the number of larger ones; else all digits are, and a bitonic network sorts.
template <int kThreads, bool kRanked, class Take>
__device__ __forceinline__ void take_largest(uint64_t* candidates, int count, int need, Order order,
                                             uint64_t* winners, int size, SelectSpace& s,
                                             Take&& take) {
  const int tid = static_cast<int>(threadIdx.x);
  const auto swapped = [](uint64_t c) { return c << 32 | c >> 32; };
  const auto key = [&](int i) { return candidates[i]; };
  unsigned rest;
  if constexpr (kRanked) {
    if (count > need + kSpare) {
      const uint64_t least =
          kth_key<kThreads, uint64_t>(count, static_cast<unsigned>(need), kSpare, s, key, &rest);
#pragma unroll 1
      for (int i = tid; i < count; i += kThreads) {
        if (candidates[i] >= least) winners[atomicAdd(&s.winner_count, 1u)] = candidates[i];
      }
      __syncthreads();  // all that remain are there
      count = static_cast<int>(s.winner_count);
      uint64_t* free = candidates;
      candidates = winners;
      winners = free;
    }
#pragma unroll 1
    for (int i = tid; i < count; i += kThreads) {
      const uint64_t c = candidates[i];
      const int place = count_above(c, candidates, count);
      if (place >= need) continue;
      if (order == Order::kByIndex) winners[place] = swapped(c);
      else take(place, c);
    }
    if (order != Order::kByIndex) return;
    __syncthreads();  // all that are placed are there
#pragma unroll 1
    for (int j = tid; j < need; j += kThreads) {
      take(count_above(winners[j], winners, need), swapped(winners[j]));
    }
  } else {
    uint64_t least = 0;
    if (count > need) {
      least = kth_key<kThreads, uint64_t>(count, static_cast<unsigned>(need), 0, s, key, &rest);
    }
#pragma unroll 1
    for (int i = tid; i < count; i += kThreads) {
      const uint64_t c = candidates[i];
      if (c < least) continue;
      const int place = static_cast<int>(atomicAdd(&s.winner_count, 1u));
      if (order == Order::kAny) take(place, c);
      else winners[place] = order == Order::kByIndex ? swapped(c) : c;
    }
    if (order == Order::kAny) return;
#pragma unroll 1
    for (int j = need + tid; j < size; j += kThreads) winners[j] = 0;
    __syncthreads();  // all that are taken are there
    sort_descending(winners, size);
#pragma unroll 1
    for (int j = tid; j < need; j += kThreads) {
      take(j, order == Order::kByIndex ? swapped(winners[j]) : winners[j]);
    }
  }
}

}  // namespace fastsae::cuda
