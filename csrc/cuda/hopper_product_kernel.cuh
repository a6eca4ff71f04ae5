// x [n, d] times W [F, d], transposed, of bfloat16: float32 sums in registers, which an epilogue
// takes from there.
//
// A block owns a multiprocessor and takes tiles of 128 x 256 sums in turn. One thread of its first
// warpgroup (the producer) has the copy engine fill a ring of stages, each 64 columns of the tile's
// rows of x and W; the other two (the consumers) multiply, 64 rows each. A stage has two barriers:
// `full` ends a phase when its bytes are there, `empty` when every warp of the consumers is done
// with them. So the producer fills stages for the next tile during an epilogue.
#pragma once

#include "cuda/hopper_copy.cuh"
#include "cuda/hopper_mma.cuh"

namespace fastsae::cuda {

constexpr int kTileRows = 128, kTileColumns = 256;
constexpr int kProductStages = 4;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kProductThreads = 128 * (1 + kConsumers);
constexpr uint32_t kRowBytes = 2 * kTileDepth;  // of a tile in shared memory
constexpr uint32_t kPatternBytes = 8 * kRowBytes;
constexpr uint32_t kXBytes = kTileRows * kRowBytes, kWBytes = kTileColumns * kRowBytes;
constexpr uint32_t kStageBytes = kXBytes + kWBytes;
// The stages start at a multiple of a pattern; then a pair of barriers for each.
constexpr size_t kProductShared = kPatternBytes + kProductStages * (kStageBytes + 16);

// The tiles of a product, in the order in which they are taken: column by column within a band of
// rows, so that the blocks at work share few rows of x and W, which the second-level cache holds.
struct ProductTiles {
  int rows, columns;      // of tiles
  int depth;              // stages of each
  const unsigned* found;  // so many rows, less `before`, if they are fewer; or null
  unsigned before;

  // Without the tiles that have none of the rows found.
  __device__ __forceinline__ ProductTiles present() const {
    if (!found) return *this;
    const unsigned all = *found, left = all > before ? all - before : 0;
    const int some = static_cast<int>(min(left, kTileRows * static_cast<unsigned>(rows)));
    return {(some + kTileRows - 1) / kTileRows, columns, depth, nullptr, 0};
  }

  struct Tile {
    int row, column;  // its first
  };
  static constexpr int kBand = 16;

  __host__ __device__ int64_t count() const { return int64_t{rows} * columns; }
  __device__ __forceinline__ Tile operator[](int64_t i) const {
    const int64_t band_size = int64_t{kBand} * columns, band = i / band_size;
    const int rest = static_cast<int>(i - band * band_size), first = static_cast<int>(band) * kBand;
    const int height = min(kBand, rows - first);
    return {(first + rest % height) * kTileRows, rest / height * kTileColumns};
  }
};

#ifdef FASTSAE_HOPPER

// A stage of the ring, and the parity of the phase that its barriers are in.
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ int stage_before() const {
    return (stage + kProductStages - 1) % kProductStages;
  }
  __device__ __forceinline__ void next() {
    if (++stage == kProductStages) {
      stage = 0;
      parity ^= 1u;
    }
  }
};

struct Ring {
  uint32_t stages;  // address in shared memory

  __device__ __forceinline__ uint32_t x(int stage) const {
    return stages + static_cast<uint32_t>(stage) * kStageBytes;
  }
  __device__ __forceinline__ uint32_t W(int stage) const { return x(stage) + kXBytes; }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return stages + kProductStages * kStageBytes + static_cast<uint32_t>(stage) * 16;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }
};

// By one thread.
__device__ __forceinline__ void produce(const Ring& ring, const TensorMap& x, const TensorMap& W,
                                        const ProductTiles& tiles) {
  RingPlace at;
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    const ProductTiles::Tile tile = tiles[i];
    for (int step = 0; step < tiles.depth; ++step, at.next()) {
      wait_phase(ring.empty(at.stage), at.parity ^ 1u);  // at once for a stage nobody has used
      arrive_expecting(ring.full(at.stage), kStageBytes);
      load_tile(ring.x(at.stage), x, step * kTileDepth, tile.row, ring.full(at.stage));
      load_tile(ring.W(at.stage), W, step * kTileDepth, tile.column, ring.full(at.stage));
    }
  }
}

// By a warpgroup: rows 64 `part` and on of every tile.
template <class Epilogue>
__device__ __forceinline__ void consume(const Ring& ring, int part, const ProductTiles& tiles,
                                        const Epilogue& epilogue) {
  RingPlace at;
  const bool first_lane = threadIdx.x % 32 == 0;
  float s[kSums] = {};
  for (int64_t i = blockIdx.x; i < tiles.count(); i += gridDim.x) {
    for (int step = 0; step < tiles.depth; ++step, at.next()) {
      wait_phase(ring.full(at.stage), at.parity);
      const uint32_t x = ring.x(at.stage) + static_cast<uint32_t>(part) * (kXBytes / kConsumers);
      const uint32_t W = ring.W(at.stage);
      fence_products();
#pragma unroll
      for (int k = 0; k < kTileDepth; k += kProductDepth) {
        const uint32_t along = static_cast<uint32_t>(2 * k);
        multiply_add(s, operand(x + along), operand(W + along), step + k > 0);
      }
      commit_products();
      wait_products<1>(s);
      // The step before has ended; its stage may be filled again.
      if (step > 0 && first_lane) arrive(ring.empty(at.stage_before()));
    }
    wait_products<0>(s);
    if (first_lane) arrive(ring.empty(at.stage_before()));
    const ProductTiles::Tile tile = tiles[i];
    epilogue(s, tile.row + part * kProductRows + first_row_of_sums(),
             tile.column + first_column_of_sums());
  }
}

#endif

// epilogue(s, row, column): takes the sums of a thread, of which s[i] is that of row
// row + 8 (i / 2 % 2), column + 8 (i / 4) + i % 2. Called by whole warps; s may be written over.
template <class Epilogue>
__global__ void __launch_bounds__(kProductThreads, 1)
    hopper_product_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap W,
                          const ProductTiles all, const Epilogue epilogue) {
#ifdef FASTSAE_HOPPER
  const ProductTiles tiles = all.present();
  FASTSAE_DYN_SMEM(unsigned char, raw);
  const Ring ring{(shared_address(raw) + kPatternBytes - 1) / kPatternBytes * kPatternBytes};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kProductStages; ++stage) {
      init_barrier(ring.full(stage), 1);
      init_barrier(ring.empty(stage), 4 * kConsumers);
    }
    show_to_async_units();
  }
  __syncthreads();  // the barriers are there before anyone arrives or waits
  // Of the 65,536 registers of a multiprocessor, 168 for each thread until here.
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) produce(ring, x, W, tiles);
  } else {
    take_registers<232>();
    consume(ring, group - 1, tiles, epilogue);
  }
#endif
}

// Writes the sums to out [rows, columns], from row to row `pitch` numbers further.
struct StoreSums {
  float* out;
  int64_t pitch;
  int rows, columns;
  bool pairs;  // two sums can be written at once: pitch and columns are even

  __device__ __forceinline__ void operator()(float (&s)[kSums], int row, int column) const {
#pragma unroll
    for (int half = 0; half < 2; ++half, row += 8) {
      if (row >= rows) return;
      float* to = out + row * pitch + column;
      // The 4 lanes of a row write 32 consecutive bytes at a time: a sector.
#pragma unroll
      for (int j = 0; j < kTileColumns / 8; ++j) {
        const int i = 4 * j + 2 * half, c = 8 * j;
        if (pairs) {
          if (column + c < columns) *reinterpret_cast<float2*>(to + c) = {s[i], s[i + 1]};
        } else {
          if (column + c < columns) to[c] = s[i];
          if (column + c + 1 < columns) to[c + 1] = s[i + 1];
        }
      }
    }
  }
};

}  // namespace fastsae::cuda
