// The k largest entries of each row of x [n, m], in one read of x.
//
// One block per row. It holds the first elements of the row in registers, takes the maxima of
// disjoint groups of them, and has in the k-th largest of these a bound that k elements reach. The
// held elements and then the rest of the row are compared with it; the few that reach it become
// candidates in shared memory, and a radix selection among these is exact. About k m / S (1 + k/2G)
// candidates are expected for S elements held and G groups; where there are more than there is room
// for (rows that ascend, or that are mostly one number), the row is selected from as a whole.
// A row that fits the registers is held whole. Where there are few rows, or very long ones, a row
// is cut into parts, each a block's, and a second kernel selects among the candidates of all.
// Large k, and float64, go through the selection from the row as a whole.
//
// Cost: one read of x (radix_topk_kernel: up to 3 of 16-bit values, 5 of float32, 9 of float64);
// 8 bytes of shared memory per candidate; no atomics on global memory.
#pragma once

#include "cuda/row_select.cuh"
#include "cuda/topk.h"

namespace fastsae::cuda {

constexpr int kRadixThreads = 512;

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
  int room, sort_size;   // candidates, and the power of two that k fits in
  uint64_t* partial;     // [n, parts, k] candidates of the parts

  template <bool kAffine>
  __device__ __forceinline__ Row<F, kAffine> row(int64_t r) const {
    return {x + r * m, bias, mask};
  }

  // Entry `to` of the output is the element `index` of the row.
  template <bool kAffine>
  __device__ __forceinline__ void write(int64_t to, const Row<F, kAffine>& row, int index) const {
    typename F::Bits bits = row.at(index);
    if constexpr (kAffine) {
      if (row.masked(index) || (relu && F::widen(bits) <= 0)) bits = 0;
    }
    values[to] = bits;
    indices[to] = index;
  }
};

// From the k taken candidates in `taken` (swapped halves unless sorted) to the output.
template <class F, bool kAffine>
__device__ __forceinline__ void write_row(const TopkArgs<F>& a, int64_t r, uint64_t* taken) {
  for (int j = a.k + static_cast<int>(threadIdx.x); j < a.sort_size; j += blockDim.x) taken[j] = 0;
  __syncthreads();  // all there before they are sorted
  sort_descending(taken, a.sort_size);
  const Row<F, kAffine> row = a.template row<kAffine>(r);
  for (int j = static_cast<int>(threadIdx.x); j < a.k; j += blockDim.x) {
    a.write(r * a.k + j, row, index_of(a.sorted ? taken[j] : taken[j] >> 32));
  }
}

// Descending order of these is the order of the output.
__device__ __forceinline__ uint64_t in_output_order(uint64_t candidate, bool sorted) {
  return sorted ? candidate : candidate << 32 | candidate >> 32;
}

// Takes the `need` largest of `count` candidates: take(place, candidate), in any order.
template <int kThreads, class Take>
__device__ __forceinline__ void take_largest(const uint64_t* candidates, int count, int need,
                                             SelectSpace& s, Take&& take) {
  uint64_t least = 0;
  if (count > need) {
    unsigned rest;
    least = kth_key<kThreads, uint64_t>(
        count, static_cast<unsigned>(need), 56, 0, s, [&](int i) { return candidates[i]; }, &rest);
  }
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();  // reset before anyone takes
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    if (candidates[i] >= least) take(static_cast<int>(atomicAdd(&s.count, 1u)), candidates[i]);
  }
}

template <class F, bool kAffine, int kThreads, int kVectors, int kMaxima, int kResident>
__global__ void __launch_bounds__(kThreads, kResident) topk_kernel(TopkArgs<F> a) {
  using Bits = typename F::Bits;
  constexpr int E = F::kVector, kUnroll = 4;
  constexpr float kMinusInf = -__builtin_huge_valf();
  FASTSAE_DYN_SMEM(uint64_t, candidates);  // [room], then `taken` [sort_size]
  __shared__ SelectSpace space;
  __shared__ unsigned warp_counts[2 * kThreads / 32];
  uint64_t* taken = candidates + a.room;
  const int tid = static_cast<int>(threadIdx.x);

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
    const int single = tid < head ? first + tid : tail + tid - head;
    const bool has_single = tid < head || single < first + size;

    uint4 held[kVectors];
    float maxima[kMaxima];
#pragma unroll
    for (int g = 0; g < kMaxima; ++g) maxima[g] = kMinusInf;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = i * kThreads + tid;
      held[i] = v < vectors ? row.load(body + v * E) : uint4{};
    }
    const float single_value = has_single ? F::widen(row.at(single)) : kMinusInf;
    maxima[0] = fmaxf(maxima[0], single_value);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i * kThreads + tid >= vectors) continue;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        // fmaxf passes over NaN: it has no place in a bound.
        float& best = maxima[kMaxima == 1 ? 0 : (i * E + e) % kMaxima];
        best = fmaxf(best, F::widen(element<F>(held[i], e)));
      }
    }
    if (tid == 0) space.count = 0;
    const float bound = need > 0 ? group_bound<kThreads, kMaxima>(maxima, need, space) : 0.0f;

    // "Not below" lets NaN pass.
    const auto push = [&](float value, int index) {
      const unsigned at = atomicAdd(&space.count, 1u);
      if (at < static_cast<unsigned>(a.room)) candidates[at] = candidate(float_key(value), index);
    };
    const auto filter = [&](const uint4& v, int index) {
      bool any = false;
#pragma unroll
      for (int e = 0; e < E; ++e) any |= !(F::widen(element<F>(v, e)) < bound);
      if (!any) return;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float value = F::widen(element<F>(v, e));
        if (!(value < bound)) push(value, index + e);
      }
    };
    if (has_single && !(single_value < bound)) push(single_value, single);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = i * kThreads + tid;
      if (v < vectors) filter(held[i], body + v * E);
    }
    for (int begin = kVectors * kThreads; begin < vectors; begin += kUnroll * kThreads) {
      uint4 next[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int v = begin + i * kThreads + tid;
        if (v < vectors) next[i] = row.load(body + v * E);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int v = begin + i * kThreads + tid;
        if (v < vectors) filter(next[i], body + v * E);
      }
    }
    __syncthreads();  // all candidates are there
    const unsigned count = space.count;

    const bool whole = a.parts == 1;
    const auto take = [&](int place, uint64_t c) {
      if (whole) taken[place] = in_output_order(c, a.sorted);
      else a.partial[task * a.k + place] = c;
    };
    __syncthreads();  // the count is read before the space is used again
    if (count <= static_cast<unsigned>(a.room)) {
      take_largest<kThreads>(candidates, static_cast<int>(count), need, space, take);
    } else {
      radix_select<kThreads>(row, first, size, static_cast<unsigned>(need), space, warp_counts,
                             [&](int place, int index) {
                               take(place, candidate(float_key(F::widen(row.at(index))), index));
                             });
    }
    if (whole) {
      write_row<F, kAffine>(a, r, taken);
    } else {
      // A part shorter than k: 0 is below every candidate.
      for (int j = need + tid; j < a.k; j += kThreads) a.partial[task * a.k + j] = 0;
    }
    __syncthreads();  // done with shared memory before the next row
  }
}

// The k largest among the candidates of all parts of a row.
template <class F, bool kAffine, int kThreads>
__global__ void __launch_bounds__(kThreads) merge_parts_kernel(TopkArgs<F> a) {
  FASTSAE_DYN_SMEM(uint64_t, candidates);  // [parts k], then `taken` [sort_size]
  __shared__ SelectSpace space;
  const int count = a.parts * a.k;
  uint64_t* taken = candidates + count;
  for (int64_t r = blockIdx.x; r < a.n; r += gridDim.x) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      candidates[i] = a.partial[r * count + i];
    }
    __syncthreads();  // loaded before they are compared
    take_largest<kThreads>(candidates, count, a.k, space, [&](int place, uint64_t c) {
      taken[place] = in_output_order(c, a.sorted);
    });
    write_row<F, kAffine>(a, r, taken);
    __syncthreads();  // done with shared memory before the next row
  }
}

// Any k and any format: from each row as a whole, in ascending index.
template <class F, bool kAffine>
__global__ void __launch_bounds__(kRadixThreads) radix_topk_kernel(TopkArgs<F> a) {
  __shared__ SelectSpace space;
  __shared__ unsigned warp_counts[2 * kRadixThreads / 32];
  for (int64_t r = blockIdx.x; r < a.n; r += gridDim.x) {
    const Row<F, kAffine> row = a.template row<kAffine>(r);
    radix_select<kRadixThreads>(
        row, 0, a.m, static_cast<unsigned>(a.k), space, warp_counts,
        [&](int place, int index) { a.write(r * a.k + place, row, index); });
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
