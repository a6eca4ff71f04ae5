// sum over the list of latent f of values[slot] x[row]: a warp owns a strip of columns of one list.
//
// Lists of more than kSegment entries are cut into segments. segments_kernel sums all but the first
// segments into scratch, and list_sum adds them to the first one in order, so that sums depend on
// nothing but the list.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/lists.h"

namespace fastsae::cuda {

template <class F>
struct ListsView {
  using Acc = typename F::Acc;
  ListsParams p;

  __device__ __forceinline__ int begin(int64_t f) const {
    return min(max(p.offsets[f], 0), p.capacity);
  }
  __device__ __forceinline__ int end(int64_t f) const { return begin(f + 1); }

  __device__ __forceinline__ Entry<Acc> entry(int j) const {
    const int row = p.rows[j], slot = p.slots[j];
    const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(p.n) &&
                        static_cast<unsigned>(slot) < static_cast<unsigned>(p.size);
    if (!inside) return {0, Acc(0)};
    if (p.wide) return {row, static_cast<const Acc*>(p.values)[slot]};
    return {row, F::widen(static_cast<const typename F::Bits*>(p.values)[slot])};
  }
  // The list that entry j is in.
  __device__ __forceinline__ int list_of(int j) const {
    int low = 0, high = p.d_sae;  // the first list that ends after j
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (p.offsets[middle + 1] <= j) low = middle + 1;
      else high = middle;
    }
    return low;
  }
};

// Sums of segments: a strip as its warp holds it, number by number, and the sum of weights.
template <class A>
struct Segments {
  A* strips;   // [later_segments, chunks, numbers of a lane, 32]
  A* weights;  // [later_segments]

  template <class Strip>
  static constexpr int kNumbers = sizeof(typename Strip::Sum) / sizeof(A);

  template <class Strip>
  __device__ __forceinline__ A* at(int64_t segment, int chunk, int chunks, int lane) const {
    return strips + (segment * chunks + chunk) * kNumbers<Strip> * 32 + lane;
  }
  // Takes the memory of `count` segments; `pack`: numbers of a pack.
  static Segments take(Scratch& scratch, int64_t count, const Split& split, int pack) {
    const int64_t numbers = int64_t{split.chunks} * split.per_lane * pack * 32;
    A* strips = scratch.take<A>(count * numbers);
    return {strips, scratch.take<A>(count)};
  }
};

// Lists of which one has its first entries in shared memory.
template <class F>
struct StagedLists {
  using Acc = typename F::Acc;
  const ListsView<F>& lists;
  const Entry<Acc>* first;  // [32]
  int begin;                // of that list

  __device__ __forceinline__ Entry<Acc> entry(int j) const {
    return j - begin < 32 ? first[j - begin] : lists.entry(j);
  }
};

// The sums over entries [begin, end) of one list into `sum`, and the sum of their weights over all
// lanes into `weights`. Lists: a ListsView<F> or StagedLists<F>.
template <class Lists, class F, bool kWide, int kPacks>
__device__ __forceinline__ void range_sum(const Lists& lists, int begin, int end,
                                          const Strip<F, kWide, kPacks>& strip,
                                          typename Strip<F, kWide, kPacks>::Sum& sum,
                                          const typename F::Bits* x, int64_t d,
                                          typename F::Acc* weights) {
  typename F::Acc own = 0;
  strip.start(sum, nullptr);
  gather_sum(strip, sum, begin, end, x, d, [&](int j) {
    const Entry<typename F::Acc> entry = lists.entry(j);
    own += entry.weight;
    return entry;
  });
  *weights = warp_sum(own);
}

constexpr int kListThreads = 128;

// Sums the segments after the first of every list. A task is one strip of one segment.
template <class F, bool kWide, int kPacks>
__global__ void __launch_bounds__(kListThreads, kGatherBlocks<kPacks>)
    segments_kernel(ListsView<F> lists, const typename F::Bits* __restrict__ x, int64_t d,
                    int packs, int chunks, Segments<typename F::Acc> out) {
  using S = Strip<F, kWide, kPacks>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kListThreads / 32);
  const int total = lists.end(lists.p.d_sae - 1);
  int64_t task = static_cast<int64_t>(blockIdx.x) * (kListThreads / 32) + threadIdx.x / 32;
  for (; task < lists.p.capacity / kSegment * int64_t{chunks}; task += warps) {
    const int place = static_cast<int>(task / chunks), chunk = static_cast<int>(task % chunks);
    // The segment of this place starts within kSegment entries of this one, in the same list.
    const int near = (place + 1) * kSegment;
    if (near >= total) continue;
    const int f = lists.list_of(near);
    const int begin = lists.begin(f), end = lists.end(f);
    const int segment = place + 1 - begin / kSegment;
    const int64_t first = begin + int64_t{segment} * kSegment;
    if (segment < 1 || first >= end) continue;
    const S strip(chunk, lane, packs);
    typename S::Sum sum;
    typename F::Acc weights;
    range_sum(lists, static_cast<int>(first), min(static_cast<int>(first) + kSegment, end), strip,
              sum, x, d, &weights);
    typename F::Acc* to = out.template at<S>(place, chunk, chunks, lane);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int e = 0; e < S::P::kSize; ++e) to[32 * (i * S::P::kSize + e)] = sum[i][e];
    }
    if (chunk == 0 && lane == 0) out.weights[place] = weights;
  }
}

// The sum over the list of latent f, segments in order, and the sum of its weights.
template <class Lists, class F, bool kWide, int kPacks>
__device__ __forceinline__ void list_sum(const Lists& lists, int begin, int end, int chunk,
                                         int chunks, const Strip<F, kWide, kPacks>& strip,
                                         typename Strip<F, kWide, kPacks>::Sum& sum,
                                         const typename F::Bits* x, int64_t d,
                                         const Segments<typename F::Acc>& later,
                                         typename F::Acc* weights) {
  using S = Strip<F, kWide, kPacks>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  range_sum(lists, begin, min(end - begin, kSegment) + begin, strip, sum, x, d, weights);
  for (int i = 1; i < (end - begin + kSegment - 1) / kSegment; ++i) {
    const int place = begin / kSegment + i - 1;
    const typename F::Acc* from = later.template at<S>(place, chunk, chunks, lane);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int e = 0; e < S::P::kSize; ++e) sum[p][e] += from[32 * (p * S::P::kSize + e)];
    }
    *weights += later.weights[place];
  }
}

// The launch of segments_kernel, for both operators that need it.
template <class F, bool kWide, int kPacks>
void launch_segments(const ListsParams& p, const void* x, int64_t d, const Split& split,
                     const Segments<typename F::Acc>& out, cudaStream_t stream) {
  const int64_t warps = p.later_segments() * split.chunks;
  if (warps == 0 || p.d_sae == 0) return;
  FASTSAE_LAUNCH((segments_kernel<F, kWide, kPacks>),
                 grid_of((warps + kListThreads / 32 - 1) / (kListThreads / 32)), kListThreads, 0,
                 stream, ListsView<F>{p}, static_cast<const typename F::Bits*>(x), d, split.packs,
                 split.chunks, out);
}

}  // namespace fastsae::cuda
