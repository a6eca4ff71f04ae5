// The `capacity` largest entries of a whole matrix [n, m] among the eligible ones, in one read of
// it. Stages, a file each:
//
// 1. Bound (matrix_select_bound_kernel.cuh). A number that somewhat more than `capacity` entries
//    exceed is estimated from a sample of the matrix: two histograms of the leading digits of its
//    keys. That takes about 10 us. A bound from an earlier call would save them, and cost five
//    reads whenever the matrix has moved on.
// 2. Filter (matrix_select_filter_kernel.cuh). One read finds the entries above the bound. A block
//    takes a tile of consecutive entries; the hits of a tile are written next to each other, in
//    order, wherever one atomic addition says, and a directory says where each tile's are: what
//    comes out does not depend on the order.
// 3. Choose (matrix_select_choose_kernel.cuh). Histograms of 11-bit digits of the candidates' keys
//    find the capacity-th largest exactly. Tiles count what they keep, and write it after what the
//    tiles before them keep. Among equal values the first (row, column) stay.
//
//      matrix, tile by tile      directory                  candidates: keys, places
//     +----------------------+   tile_base tile_count      +---------------------+
//     | tile 0: . . h . h .  |       3         2      -+   | h        of tile 1  | 0
//     | tile 1: h . . h . h  |       0         3      -|-> | h                   |
//     | tile 2: . . . . . .  |       5         0       |   | h                   |
//     +----------------------+                         +-> | h        of tile 0  | 3
//                                                          | h                   |
//      h: a hit, above the bound                           +---------------------+ capacity
//
// A bound that was too high or too low to be of use is noticed by every kernel after the filter;
// they read the matrix instead of the candidates then. Nothing is decided on the host. A matrix
// that is small, or of which much is kept, is read so from the start, without stages 1 and 2.
//
// The choice needs only the directory and what it points to (and, for the sign of a zero, the
// entry), so another producer of tiles may take the place of stages 1 and 2:
// block_select_kernel.cuh, of a matrix that is met a block at a time, and hopper_append_kernel.cuh,
// where it is computed.
//
// Cost: one read of the matrix, about 6 bytes written and four times read per candidate (10 of
// float64), of which there are 1.2 to 2 times as many as are kept; integer atomics only. Of dense
// matrices four or five reads.
#pragma once

#include "cuda/column_view.cuh"
#include "cuda/matrix_select.h"

namespace fastsae::cuda {

constexpr int kSampleBits = 2 * kDigitBits;  // of a key in the sample

// What the filter leaves for the choice.
template <class Key>
struct Candidates {
  int64_t capacity;      // -1: there are none, the matrix is read
  Key* keys;             // [capacity]
  uint16_t* places;      // [capacity] in the tile
  uint32_t* tile_base;   // [tiles] of the first candidate of a tile
  uint32_t* tile_count;  // [tiles]
};

template <class F>
struct SelectArgs {
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  using Key = KeyOf<F>;

  static constexpr int kTile = 32768 / static_cast<int>(sizeof(Key));  // of filter_kernel

  struct Output {
    int64_t capacity, first_row;  // first_row is added to `rows`
    Bits* values;
    int32_t *indices, *rows, *offsets;
    Acc* smallest;     // the smallest kept value; or null
    Acc* lower_bound;  // what later entries have to exceed; or null
    bool list;         // padding is (NaN, row 2^31 - 1)
  };
  // The matrix is cut into tiles, which `tile_lanes` lanes look at together. Without candidates
  // (dense) there are more of both, since every entry is looked at.
  struct Plan {
    bool dense;
    int tile, tile_lanes;
    int64_t tiles;
    int64_t sample_vectors;  // 0: no sample
    int64_t sample_rank;     // the bound is the sample's entry of this rank
  };
  struct Header {  // zeroed before the first kernel
    Count candidates;
    Count sampled;  // the bound is the sample's, and above the threshold
    Count idle;     // digit_kernel and count_kernel have nothing to do
    Key bound;      // of a matrix that is met in blocks, or 0
    Progress<Key> sample;
    Count sample_histogram[2][kDigits];
    DigitSearch<F> search;
  };
  struct Space {
    Header* header;
    uint32_t* sample;     // [sample_vectors kVector] leading bits of keys
    uint32_t* tile_kept;  // [tiles] above the capacity-th largest; equal to it in the upper half
    Count* block_kept;    // [2, blocks] the same, of the tiles of a block
  };

  MatrixView<F> in;
  Output out;
  Plan plan;
  Candidates<Key> candidates;
  Space scratch;

  // The candidates are not what is looked for: kernels read the matrix.
  __device__ __forceinline__ bool reads_matrix() const {
    const int64_t found = static_cast<int64_t>(scratch.header->candidates);
    return found > candidates.capacity || (scratch.header->sampled && found < out.capacity);
  }

  __device__ __forceinline__ bool is_idle() const { return scratch.header->idle != 0; }

  // The column of entry `local` of a tile whose first entry has column `first`.
  __device__ __forceinline__ int column(int first, int local) const {
    const unsigned c = static_cast<unsigned>(first) + static_cast<unsigned>(local);
    const unsigned width = static_cast<unsigned>(in.m);
    if (c < width) return static_cast<int>(c);
    return static_cast<int>(in.m >= plan.tile ? c - width : c % width);
  }
};

}  // namespace fastsae::cuda
