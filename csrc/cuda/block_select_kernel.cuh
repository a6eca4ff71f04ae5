// The largest entries of a matrix that is met a block at a time, in one read of each block.
//
// As in matrix_select_args.cuh, entries above a bound are candidates, a directory says where those
// of each tile are, and the choice works on these alone. Here a tile is what a block has of a row,
// so that the directory is in the order of (row, column) whatever the order of blocks. The bound is
// the capacity-th largest of what was met up to some block; whatever is not among the largest of a
// part of the matrix is not among the largest of all of it.
//
// 1. Filter. One read of a block; a CUDA block takes a tile, marks its hits, counts them, and
//    writes them in order wherever one atomic addition says. There is always room for all entries
//    of the blocks between two tightenings.
// 2. Tighten. Now and then, where there are more candidates than kTightenAt times those that are
//    kept, the capacity largest are chosen as at the end, but written back as candidates, and the
//    smallest of them becomes the bound. Whether that is so, kernels find out for themselves:
//    otherwise they return at once.
// 3. Choose, when all blocks were met: the kernels of matrix_select_choose_kernel.cuh.
//
// Cost: one read of every block; 6 bytes (10 of float64) written per candidate and read at every
// tightening. In random order there are about capacity log(blocks) candidates, and a tightening
// whenever kTightenAt times as much of the matrix was met as at the last one.
#pragma once

#include "cuda/block_select.h"
#include "cuda/matrix_select_choose_kernel.cuh"

namespace fastsae::cuda {

// The block as the filter sees it, and what is known about its columns.
template <class F>
struct FilterBlock {
  const typename F::Bits* x;
  int64_t pitch, first, rows;
  int64_t tiles_per_row, tile_of_row;
  int first_column, columns;

  __device__ __forceinline__ MatrixView<F> row(const MatrixView<F>& all, int64_t r) const {
    const auto from = [&](auto* p) { return p ? p + first_column : nullptr; };
    return {x + r * pitch,  from(all.bias),
            from(all.mask), all.per_column ? from(all.threshold) : all.threshold,
            nullptr,        1,
            columns,        columns,
            all.per_column};
  }
};

// The largest number that is below the one with this key.
template <class A>
__device__ __forceinline__ typename A::Acc number_below(typename A::Bits key) {
  using Key = typename A::Bits;
  // Both zeros have the key kSign; the one before it would be -0.
  return A::widen(A::from_key(static_cast<Key>(key - (key == A::kSign ? 2 : 1))));
}

template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads, kColumns ? 3 : 4)
    filter_block_kernel(SelectArgs<F> a, FilterBlock<F> block) {
  using Acc = typename F::Acc;
  constexpr int E = F::kVector, kVectors = 4, kStep = kSelectThreads * E;
  constexpr int kAtOnce = kColumns ? 2 : kVectors;  // as many as registers allow
  __shared__ unsigned hits[kSelectThreads];         // a bit for each entry of the tile
  __shared__ unsigned warp_sums[kSelectThreads / 32];
  __shared__ Count base;
  const int tid = static_cast<int>(threadIdx.x);
  const KeyOf<F> bound = a.scratch.header->bound;
  const Acc threshold = a.in.common_threshold();
  const Acc lower_bound = bound ? number_below<F>(bound) : threshold;

  for (int64_t r = blockIdx.x; r < block.rows; r += gridDim.x) {
    const MatrixView<F> row = block.row(a.in, r);
    const bool whole = kColumns && row.whole_columns();
    hits[tid] = 0;
    __syncthreads();  // zeroed before the first hit
    for (int begin = tid * E; begin < block.columns; begin += kVectors * kStep) {
      uint4 held[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (begin + v * kStep < block.columns) held[v] = load_once(row.bits + begin + v * kStep);
      }
#pragma unroll
      for (int from = 0; from < kVectors; from += kAtOnce) {
        const auto column = [&](int v) { return begin + (from + v) * kStep; };
        VectorColumns<F> columns[kAtOnce];
#pragma unroll
        for (int v = 0; kColumns && v < kAtOnce; ++v) {
          if (column(v) < block.columns) columns[v].load(row, column(v), whole);
        }
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
          const int c = column(v);
          if (c >= block.columns) continue;
          Acc value[E];
          entry_values<F, kColumns>(row, held[from + v], columns[v], c, c, value);
          unsigned found = 0;
#pragma unroll
          for (int e = 0; e < E; ++e) {
            found |= (value[e] > lower_bound && c + e < block.columns ? 1u : 0u) << e;
          }
          if (found) atomicOr(&hits[c / 32], found << (c % 32));
        }
      }
    }
    __syncthreads();  // all hits are there
    unsigned word = hits[tid], count;
    const unsigned before =
        block_exclusive_sum<kSelectThreads>(static_cast<unsigned>(__popc(word)), warp_sums, &count);
    if (tid == 0) {
      const int64_t tile = (block.first + r) * block.tiles_per_row + block.tile_of_row;
      base = atomicAdd(&a.scratch.header->candidates, static_cast<Count>(count));
      a.candidates.tile_base[tile] = static_cast<uint32_t>(base);
      a.candidates.tile_count[tile] = count;
    }
    __syncthreads();  // the place of the tile's candidates is known
    for (Count to = base + before; word; word &= word - 1) {
      const int c = 32 * tid + __ffs(static_cast<int>(word)) - 1;
      a.candidates.keys[to] = entry_key<F, kColumns>(row, c, c, threshold);
      a.candidates.places[to++] = static_cast<uint16_t>(c);
    }
  }
}

// Decides whether the kernels after it tighten, and empties the search.
template <class F>
__global__ void __launch_bounds__(kSelectThreads)
    decide_tightening_kernel(SelectArgs<F> a, Count at_least) {
  auto* header = a.scratch.header;
  const bool wanted = header->candidates >= at_least;
  if (blockIdx.x == 0 && threadIdx.x == 0) header->idle = !wanted;
  if (!wanted) return;
  constexpr int kWords = sizeof(DigitSearch<F>) / sizeof(uint32_t);
  uint32_t* words = reinterpret_cast<uint32_t*>(&header->search);
  const int stride = static_cast<int>(gridDim.x) * kSelectThreads;
  for (int i = static_cast<int>(blockIdx.x) * kSelectThreads + static_cast<int>(threadIdx.x);
       i < kWords; i += stride) {
    words[i] = 0;
  }
}

// Copies the candidates that stay, in order, and says where each tile's will be. With the grid of
// count_kernel.
template <class F>
__global__ void __launch_bounds__(kSelectThreads, 3)
    keep_kernel(SelectArgs<F> a, Candidates<KeyOf<F>> kept) {
  using Key = KeyOf<F>;
  __shared__ KeptSpace space;
  if (a.is_idle()) return;
  for_each_kept<F, false>(
      a, space,
      [&](Count to, int64_t, int place, Key key) {
        kept.keys[to] = key;
        kept.places[to] = static_cast<uint16_t>(place);
      },
      [&](int64_t tile, Count first, unsigned count) {
        a.candidates.tile_base[tile] = static_cast<uint32_t>(first);
        a.candidates.tile_count[tile] = count;
      });
}

// Puts them back in place of all candidates.
template <class F>
__global__ void __launch_bounds__(kSelectThreads)
    keep_back_kernel(SelectArgs<F> a, Candidates<KeyOf<F>> kept) {
  using Key = KeyOf<F>;
  if (a.is_idle()) return;
  auto* header = a.scratch.header;
  const Progress<Key> known = header->search.progress[KeyDigits<F>::kPasses];
  const int64_t count = static_cast<int64_t>(known.kept_count);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
  for (int64_t i = thread; i < count; i += static_cast<int64_t>(gridDim.x) * kSelectThreads) {
    a.candidates.keys[i] = kept.keys[i];
    a.candidates.places[i] = kept.places[i];
  }
  if (thread == 0) {
    header->candidates = known.kept_count;
    if (count == a.out.capacity) header->bound = known.prefix;
  }
}

}  // namespace fastsae::cuda
