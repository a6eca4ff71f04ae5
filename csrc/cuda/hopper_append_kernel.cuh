// An epilogue of the product on Hopper that selects in the whole matrix: sums above its bound
// become candidates as in block_select_kernel.cuh, and the others never go to memory.
#pragma once

#include "cuda/block_select_kernel.cuh"
#include "cuda/hopper_hits.cuh"

namespace fastsae::cuda {

// A tile of the directory is what a tile of the product has of a row. There is room for all sums.
struct AppendSums {
  SelectArgs<Float32> a;
  int64_t tiles_per_row;
  int rows, columns;
  int first_column;  // of these columns, in the whole row; a multiple of kTileColumns

  __device__ __forceinline__ void operator()(float (&s)[kSums], int row, int column) const {
    const auto here = [&](auto* p) { return p ? p + first_column : nullptr; };
    const uint32_t bound = a.scratch.header->bound;
    const float above = bound ? number_below<Float32>(bound) : a.in.common_threshold();
    const float* thresholds = a.in.per_column ? here(a.in.threshold) : nullptr;
    Hits hits;
    hits.mark(s, column, columns, here(a.in.bias), here(a.in.mask), [&](int, int c, float sum) {
      return sum > above && (!thresholds || sum > __ldg(thresholds + c));
    });
    unsigned count[2];  // of the two rows, which 4 lanes share
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= rows) hits.forget(half);
      count[half] = sum_of_row(static_cast<unsigned>(hits.count(half)));
    }
    if (__all_sync(kFullWarp, count[0] + count[1] == 0)) return;
    Count to = reserve(count[0] + count[1]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      append(s, hits, half, row + 8 * half, first_column + column, to, count[half]);
      to += count[half];
    }
  }

 private:
  __device__ __forceinline__ static unsigned sum_of_row(unsigned x) {
    x += __shfl_xor_sync(kFullWarp, x, 1);
    return x + __shfl_xor_sync(kFullWarp, x, 2);
  }

  // The first of the places of 4 lanes, which all name the same count; the warp asks once.
  __device__ __forceinline__ Count reserve(unsigned count) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    unsigned upto = count;
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) {
      const unsigned other = __shfl_up_sync(kFullWarp, upto, step);
      if (lane >= step) upto += other;
    }
    Count base = 0;
    if (lane == 31) base = atomicAdd(&a.scratch.header->candidates, Count{upto});
    return __shfl_sync(kFullWarp, base, 31) + upto - count;
  }

  // Writes the hits of a row from `to` on, in ascending column, and where they are.
  __device__ __forceinline__ void append(const float (&s)[kSums], const Hits& hits, int half,
                                         int64_t row, int column, Count to, unsigned count) const {
    const int lane = static_cast<int>(threadIdx.x) % 4;
    uint32_t words[4][2];  // of the lanes of this row
#pragma unroll
    for (int other = 0; other < 4; ++other) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        words[other][e] = __shfl_sync(kFullWarp, hits.bits[half][e], other, 4);
      }
    }
    if (lane == 0 && count > 0) {
      const int64_t tile = row * tiles_per_row + column / kTileColumns;
      a.candidates.tile_base[tile] = static_cast<uint32_t>(to);
      a.candidates.tile_count[tile] = count;
    }
    hits.for_each(s, half, [&](float sum, int j, int e) {
      const uint32_t below = (1u << j) - 1u, upto = below | 1u << j;
      unsigned before = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // columns of an eight
        before +=
            static_cast<unsigned>(__popc(words[i / 2][i % 2] & (i < 2 * lane + e ? upto : below)));
      }
      a.candidates.keys[to + before] = Float32::key(Float32::narrow(sum));
      a.candidates.places[to + before] = static_cast<uint16_t>(column % kTileColumns + 8 * j + e);
    });
  }
};

}  // namespace fastsae::cuda
