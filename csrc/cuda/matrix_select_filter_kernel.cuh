// Stage 2 of a selection in a whole matrix: the entries above the bound become candidates.
#pragma once

#include "cuda/matrix_select_bound_kernel.cuh"

namespace fastsae::cuda {

// A block takes a tile at a time: marks its hits, counts them, and writes them in order.
template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads, kColumns                       ? 3
                                                  : sizeof(typename F::Bits) > 2 ? 4
                                                                                 : 5)
    filter_kernel(SelectArgs<F> a) {
  using Acc = typename F::Acc;
  constexpr int E = F::kVector, kTile = SelectArgs<F>::kTile;
  constexpr int kVectors = kTile / (kSelectThreads * E);
  constexpr int kWords = kTile / 32;
  constexpr int kAtOnce = !kColumns ? kVectors : E >= 4 ? 2 : 1;  // as many as registers allow
  static_assert(kVectors % kAtOnce == 0);
  static_assert(kWords <= kSelectThreads);
  __shared__ unsigned hits[2][kWords];  // a bit for each entry of the tile; of two tiles
  __shared__ unsigned warp_sums[kSelectThreads / 32];
  __shared__ Count base;
  __shared__ DigitSpace space;
  const int tid = static_cast<int>(threadIdx.x);
  const Acc lower_bound = filter_bound(a, space), threshold = a.in.common_threshold();
  const bool is_aligned = (reinterpret_cast<uintptr_t>(a.in.bits) & 15) == 0;
  const bool whole = kColumns && a.in.whole_columns();
  if (tid < kWords) hits[0][tid] = 0;
  __syncthreads();  // zeroed before the first hit

  int turn = 0;
  for (int64_t tile = blockIdx.x; tile < a.plan.tiles; tile += gridDim.x, turn ^= 1) {
    const int64_t start = tile * kTile;
    const int first = kColumns ? static_cast<int>(start % a.in.m) : 0;
    uint4 held[kVectors];
    if (is_aligned && start + kTile <= a.in.total) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        held[v] = load_once(a.in.bits + start + (v * kSelectThreads + tid) * E);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        held[v] = load_entries<F>(a.in.bits, start + (v * kSelectThreads + tid) * E, a.in.total);
      }
    }
#pragma unroll
    for (int begin = 0; begin < kVectors; begin += kAtOnce) {
      const auto local = [&](int v) { return (v * kSelectThreads + tid) * E; };
      // Issue all loads before consuming any.
      VectorColumns<F> columns[kAtOnce];
#pragma unroll
      for (int v = 0; kColumns && v < kAtOnce; ++v) {
        columns[v].load(a.in, a.column(first, local(begin + v)), whole);
      }
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const uint4& entries = held[begin + v];
        if (!kColumns && !any_above<F>(entries, lower_bound)) continue;
        const int at = local(begin + v);
        Acc value[E];
        entry_values<F, kColumns>(a.in, entries, columns[v], start + at,
                                  kColumns ? a.column(first, at) : 0, value);
        unsigned found = 0;
#pragma unroll
        for (int e = 0; e < E; ++e) found |= (value[e] > lower_bound ? 1u : 0u) << e;
        if (found) atomicOr(&hits[turn][at / 32], found << (at % 32));
      }
    }
    __syncthreads();                            // all hits are there
    if (tid < kWords) hits[turn ^ 1][tid] = 0;  // those of the tile before
    unsigned word = tid < kWords ? hits[turn][tid] : 0;
    unsigned count;
    const unsigned before =
        block_exclusive_sum<kSelectThreads>(static_cast<unsigned>(__popc(word)), warp_sums, &count);
    if (tid == 0) {
      base = atomicAdd(&a.scratch.header->candidates, static_cast<Count>(count));
      a.candidates.tile_base[tile] = static_cast<uint32_t>(base);
      a.candidates.tile_count[tile] = count;
    }
    __syncthreads();  // the place of the tile's candidates is known
    if (base + count > static_cast<Count>(a.candidates.capacity)) word = 0;
    // They were read a moment ago: this is not another read of the memory.
    for (Count to = base + before; word; word &= word - 1) {
      const int local = 32 * tid + __ffs(static_cast<int>(word)) - 1;
      a.candidates.keys[to] = entry_key<F, kColumns>(
          a.in, start + local, kColumns ? a.column(first, local) : 0, threshold);
      a.candidates.places[to++] = static_cast<uint16_t>(local);
    }
  }
}

}  // namespace fastsae::cuda
