// The k largest entries of each row of x [n, m], in one read of x.
//
// One block per row, which passes through registers a tile at a time. The maxima of disjoint groups
// of the first tile give a bound: the k-th largest of them, which k elements reach. Every tile is
// compared with it, each 16 bytes by the largest number in them; the few elements that reach it
// become candidates in shared memory. About k m / S (1 + k/2G) are expected for tiles of S elements
// and G groups. Of few candidates, the place of each is the number of larger ones; more are first
// thinned out by digits of their keys, and large k is sorted by a bitonic network. Where there are
// more candidates than there is room for (rows that ascend, or that are mostly one number), the row
// is selected from as a whole.
// Where there are few rows, or very long ones, a row is cut into parts, each a block's, and a
// second kernel selects among the candidates of all. k above 512, and float64, go through the
// selection from the row as a whole.
//
// Between two streams of a block lie the bound, two digits, and the selection: 11 barriers where k
// is small. Other blocks stream meanwhile, and the next row's first tile is fetched into the
// second-level cache.
//
// Cost: one read of x (radix_topk_kernel: up to 3 of 16-bit values, 5 of float32, 9 of float64);
// 8 bytes of shared memory per candidate; no atomics on global memory.
#pragma once

#include "cuda/row_select.cuh"
#include "cuda/topk.h"

namespace fastsae::cuda {

constexpr int kRadixThreads = 512;
constexpr int kMostRanked = 128;  // the largest k whose candidates are ordered by counting
constexpr int kSpare = 96;        // candidates more than k that are not worth another digit

// Arguments of the kernels, typed.
template <class F>
struct TopkArgs {
  const typename F::Bits* x;
  const typename F::Acc* bias;
  const bool* mask;
  int64_t n;
  int m, k;
  bool sorted, relu;
  typename F::Bits* values;
  int32_t* indices;
  int parts, part_size;  // parts of a row, and their elements
  int room, taken;       // candidates in shared memory, and those taken from them
  int64_t ahead;         // rows that are worked on at a time
  uint64_t* partial;     // [n, parts, k] candidates of the parts

  template <bool kAffine>
  __device__ __forceinline__ Row<F, kAffine> row(int64_t r) const {
    return {x + r * m, bias, mask};
  }

  // Entry `to` of the output is the element `index` of the row, and these its bits.
  template <bool kAffine>
  __device__ __forceinline__ void write(int64_t to, const Row<F, kAffine>& row, int index,
                                        typename F::Bits bits) const {
    if constexpr (kAffine) {
      if (row.masked(index) || (relu && F::widen(bits) <= 0)) bits = 0;
    }
    values[to] = bits;
    indices[to] = index;
  }

  // The same from a candidate. Its key tells the value, but for NaN and the sign of a zero.
  template <bool kAffine>
  __device__ __forceinline__ void write(int64_t to, const Row<F, kAffine>& row, uint64_t c) const {
    const uint32_t key = static_cast<uint32_t>(c >> 32);
    const int index = index_of(c);
    const bool told = key != ~0u && key != Float32::kSign;
    write(to, row, index, told ? F::narrow(Float32::widen(Float32::from_key(key))) : row.at(index));
  }
};

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
// `taken`. Where k is small (kRanked), digits are settled until few more than k remain, and the
// place of each is the number of larger ones; else all digits are, and a bitonic network sorts.
template <int kThreads, bool kRanked, class Take>
__device__ __forceinline__ void take_largest(uint64_t* candidates, int count, int need, Order order,
                                             uint64_t* taken, int size, SelectSpace& s,
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
        if (candidates[i] >= least) taken[atomicAdd(&s.taken, 1u)] = candidates[i];
      }
      __syncthreads();  // all that remain are there
      count = static_cast<int>(s.taken);
      uint64_t* free = candidates;
      candidates = taken;
      taken = free;
    }
#pragma unroll 1
    for (int i = tid; i < count; i += kThreads) {
      const uint64_t c = candidates[i];
      const int place = count_above(c, candidates, count);
      if (place >= need) continue;
      if (order == Order::kByIndex) taken[place] = swapped(c);
      else take(place, c);
    }
    if (order != Order::kByIndex) return;
    __syncthreads();  // all that are placed are there
#pragma unroll 1
    for (int j = tid; j < need; j += kThreads) {
      take(count_above(taken[j], taken, need), swapped(taken[j]));
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
      const int place = static_cast<int>(atomicAdd(&s.taken, 1u));
      if (order == Order::kAny) take(place, c);
      else taken[place] = order == Order::kByIndex ? swapped(c) : c;
    }
    if (order == Order::kAny) return;
#pragma unroll 1
    for (int j = need + tid; j < size; j += kThreads) taken[j] = 0;
    __syncthreads();  // all that are taken are there
    sort_descending(taken, size);
#pragma unroll 1
    for (int j = tid; j < need; j += kThreads) {
      take(j, order == Order::kByIndex ? swapped(taken[j]) : taken[j]);
    }
  }
}

template <class F, bool kAffine, int kThreads, int kVectors, int kMaxima, int kResident>
__global__ void __launch_bounds__(kThreads, kResident) topk_kernel(TopkArgs<F> a) {
  using Bits = typename F::Bits;
  constexpr int E = F::kVector, kPerWord = 4 / int{sizeof(Bits)};
  constexpr int kWords = kMaxima < kPerWord ? 1 : kMaxima / kPerWord;  // of maxima
  constexpr float kMinusInf = -__builtin_huge_valf();
  FASTSAE_DYN_SMEM(uint64_t, candidates);  // [room], then [taken]
  __shared__ SelectSpace space;
  __shared__ unsigned warp_counts[2 * kThreads / 32];
  const int tid = static_cast<int>(threadIdx.x);
  const bool whole = a.parts == 1;
  clear_histogram(space);

  for (int64_t task = blockIdx.x; task < a.n * a.parts; task += gridDim.x) {
    const int64_t r = task / a.parts;
    const int part = static_cast<int>(task % a.parts);
    const Row<F, kAffine> row = a.template row<kAffine>(r);
    const int first = min(part * a.part_size, a.m), size = min(a.part_size, a.m - first);
    const int need = min(a.k, size);

    // Elements up to the first whole vector, the vectors, and the elements behind them. Of those
    // outside of vectors there are fewer than threads.
    const int misaligned =
        static_cast<int>(reinterpret_cast<uintptr_t>(row.x + first) & 15) / int{sizeof(Bits)};
    const int head = min((E - misaligned) % E, size), vectors = (size - head) / E;
    const int body = first + head, tail = body + vectors * E;

    // The first tile has the elements outside of vectors too.
    const int step = kThreads * E, start = body + tid * E;
    if (tid == 0) space.count = space.taken = 0;
    uint4 held[kVectors] = {};  // of the tile: from start on, a step apart

    const auto bound_from_held = [&](float single_value) {
      constexpr uint32_t kLeast = uint32_t{F::kSign | F::kInf} * (kPerWord == 2 ? 0x10001u : 1u);
      uint32_t words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] = kLeast;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (start + i * step >= tail) continue;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          // Passes over NaN: it has no place in a bound.
          words[w % kWords] = F::larger(words[w % kWords], word(held[i], w));
        }
      }
      float maxima[kMaxima];
#pragma unroll
      for (int g = 0; g < kMaxima; ++g) maxima[g] = number<F>(words[g / kPerWord], g % kPerWord);
      if constexpr (kMaxima < kPerWord) maxima[0] = max_number(maxima[0], number<F>(words[0], 1));
      maxima[0] = max_number(maxima[0], single_value);
      return group_bound(maxima, need, space);
    };
    const auto push = [&](unsigned at, Bits bits, int index) {
      if (at >= static_cast<unsigned>(a.room)) return;
      candidates[at] = candidate(float_key(F::widen(bits)), index);
    };
    float bound = 0.0f;
#pragma unroll 1
    for (int begin = first; begin < first + size; begin += kVectors * step) {
      const int j = begin - first + start;
      row.load(held, j, step, tail);
      if (begin == first) {
        const int single = tid < head ? first + tid : tail + tid - head;
        const bool has_single = tid < head || single < first + size;
        const float single_value = has_single ? F::widen(row.at(single)) : kMinusInf;
        bound = bound_from_held(single_value);
        if (has_single && !(single_value < bound)) {
          push(atomicAdd(&space.count, 1u), F::narrow(single_value), single);
        }
      }
      // The vectors with a hit: few. "Not below" lets NaN pass.
      unsigned hit = 0;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const uint4& v = held[i];
        const uint32_t most =
            F::larger_or_nan(F::larger_or_nan(v.x, v.y), F::larger_or_nan(v.z, v.w));
        const bool low = number<F>(most, 0) < bound, high = number<F>(most, kPerWord - 1) < bound;
        const bool below = (low & high) | (j + i * step >= tail);
        hit |= below ? 0u : 1u << i;
      }
      // A thread mostly has none or one in a tile, so the warp comes by here once or twice.
#pragma unroll 1
      for (; hit != 0; hit &= hit - 1) {
        const int which = __ffs(static_cast<int>(hit)) - 1, index = j + which * step;
        uint4 v = held[0];
#pragma unroll
        for (int i = 1; i < kVectors; ++i) {
          if (i == which) v = held[i];
        }
        unsigned hits = 0;
#pragma unroll
        for (int e = 0; e < E; ++e) hits |= F::widen(element<F>(v, e)) < bound ? 0u : 1u << e;
        unsigned at = atomicAdd(&space.count, static_cast<unsigned>(__popc(hits)));
#pragma unroll 1
        for (; hits != 0; hits &= hits - 1) {
          const int e = __ffs(static_cast<int>(hits)) - 1;
          push(at++, element<F>(v, e), index + e);
        }
      }
    }
    __syncthreads();  // all candidates are there
    int count = static_cast<int>(space.count);
    // While this row is selected from, the start of the one that comes after it is on its way.
    if (whole && r + a.ahead < a.n) {
      constexpr int kTile = kVectors * kThreads * E;
      prefetch_block(row.x + a.ahead * a.m, min(a.m, kTile) * unsigned{sizeof(Bits)});
    }

    if (count > a.room) {
      count = need;
      radix_select<kThreads>(
          row, first, size, static_cast<unsigned>(need), space, warp_counts,
          [&](int place, int index) { push(static_cast<unsigned>(place), row.at(index), index); });
      __syncthreads();  // selected before they are ordered
    }
    const Order order = !whole ? Order::kAny : a.sorted ? Order::kByValue : Order::kByIndex;
    take_largest<kThreads, kMaxima == 1>(candidates, count, need, order, candidates + a.room,
                                         a.taken, space, [&](int place, uint64_t c) {
                                           if (whole) a.write(r * a.k + place, row, c);
                                           else a.partial[task * a.k + place] = c;
                                         });
    // A part shorter than k: 0 is below every candidate.
#pragma unroll 1
    for (int j = need + tid; j < a.k; j += kThreads) a.partial[task * a.k + j] = 0;
    __syncthreads();  // done with shared memory before the next row
  }
}

// The k largest among the candidates of all parts of a row.
template <class F, bool kAffine, int kThreads, bool kRanked>
__global__ void __launch_bounds__(kThreads) merge_parts_kernel(TopkArgs<F> a) {
  FASTSAE_DYN_SMEM(uint64_t, candidates);  // [parts k], then [taken]
  __shared__ SelectSpace space;
  const int count = a.parts * a.k;
  clear_histogram(space);
  for (int64_t r = blockIdx.x; r < a.n; r += gridDim.x) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      candidates[i] = a.partial[r * count + i];
    }
    if (threadIdx.x == 0) space.taken = 0;
    __syncthreads();  // loaded before they are compared
    const Row<F, kAffine> row = a.template row<kAffine>(r);
    take_largest<kThreads, kRanked>(
        candidates, count, a.k, a.sorted ? Order::kByValue : Order::kByIndex, candidates + count,
        a.taken, space, [&](int place, uint64_t c) { a.write(r * a.k + place, row, c); });
    __syncthreads();  // done with shared memory before the next row
  }
}

// Any k and any format: from each row as a whole, in ascending index.
template <class F, bool kAffine>
__global__ void __launch_bounds__(kRadixThreads) radix_topk_kernel(TopkArgs<F> a) {
  __shared__ SelectSpace space;
  __shared__ unsigned warp_counts[2 * kRadixThreads / 32];
  clear_histogram(space);
  for (int64_t r = blockIdx.x; r < a.n; r += gridDim.x) {
    const Row<F, kAffine> row = a.template row<kAffine>(r);
    radix_select<kRadixThreads>(
        row, 0, a.m, static_cast<unsigned>(a.k), space, warp_counts,
        [&](int place, int index) { a.write(r * a.k + place, row, index, row.at(index)); });
  }
}

// Reorders each row's k entries, which are in ascending index, by descending value, lowest index
// first among equals: a bitonic sort of keys and places in global scratch, one block per row.
template <class F>
__global__ void __launch_bounds__(kRadixThreads, 2)
    sort_kernel(int64_t n, int k, int size, uint64_t* __restrict__ space,
                typename F::Bits* __restrict__ values, int32_t* __restrict__ indices) {
  using Bits = typename F::Bits;
  for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
    uint64_t* keys = space + static_cast<int64_t>(blockIdx.x) * 2 * size;
    uint64_t* places = keys + size;
    Bits* value = values + row * k;
    int32_t* index = indices + row * k;
    for (int j = static_cast<int>(threadIdx.x); j < size; j += kRadixThreads) {
      keys[j] = j < k ? static_cast<uint64_t>(F::key(value[j])) : 0;
      places[j] = static_cast<uint64_t>(j);
    }
    __syncthreads();  // filled before sorting
    for (int width = 2; width <= size; width <<= 1) {
      for (int step = width >> 1; step > 0; step >>= 1) {
#pragma unroll 1
        for (int j = static_cast<int>(threadIdx.x); j < size; j += kRadixThreads) {
          const int p = j ^ step;
          if (p < j) continue;
          // Places ascend with the index, so they break ties; padding (key 0) has the highest.
          const bool j_first = keys[j] > keys[p] || (keys[j] == keys[p] && places[j] < places[p]);
          const bool want_j_first = (j & width) == 0;
          if (j_first == want_j_first) continue;
          const uint64_t key = keys[j], place = places[j];
          keys[j] = keys[p];
          places[j] = places[p];
          keys[p] = key;
          places[p] = place;
        }
        __syncthreads();  // one exchange step done by all before the next
      }
    }
    // Gather through the scratch: the keys are no longer needed and take the old entries.
    for (int j = static_cast<int>(threadIdx.x); j < k; j += kRadixThreads) {
      keys[j] = static_cast<uint64_t>(value[j]);
    }
    __syncthreads();  // old values saved before any is overwritten
    for (int j = static_cast<int>(threadIdx.x); j < k; j += kRadixThreads) {
      const int from = static_cast<int>(places[j]);
      value[j] = static_cast<Bits>(keys[from]);
      places[j] = static_cast<uint64_t>(static_cast<uint32_t>(index[from]));
    }
    __syncthreads();  // old indices read before any is overwritten
    for (int j = static_cast<int>(threadIdx.x); j < k; j += kRadixThreads) {
      index[j] = static_cast<int32_t>(places[j]);
    }
    __syncthreads();  // done with the scratch before the next row
  }
}

}  // namespace fastsae::cuda
