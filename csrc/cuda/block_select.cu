// Launches of a selection in a matrix that is met a block at a time, and its scratch. No torch
// header: nvcc takes seconds, and the emulation builds it.
#include "cuda/block_select.h"

#include <algorithm>

#include "cuda/block_select_kernel.cuh"

namespace fastsae::cuda {
namespace {

// Candidates, for each that is kept, that are worth a tightening, and the memory for all entries of
// some blocks. Little in the emulation, so that small matrices are tightened.
#ifdef FASTSAE_EMULATED
constexpr int64_t kTightenAt = 1, kSlack = 16, kRoomBytes = 1 << 15;
#else
constexpr int64_t kTightenAt = 4, kSlack = 4096, kRoomBytes = int64_t{1} << 28;
#endif

unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(
      std::max<int64_t>(1, std::min<int64_t>(items, 6 * multiprocessors())));
}
unsigned blocks_of_threads(int64_t items) {
  return blocks_for((items + kSelectThreads - 1) / kSelectThreads);
}

template <class F>
struct Blocks {
  SelectArgs<F> args;
  Candidates<KeyOf<F>> kept;
  int64_t tiles_per_row, tighten_at;
  int64_t between;  // blocks that there is room for: after so many, candidates are tightened
};

template <class F>
Blocks<F> blocks_of(const BlockSelectParams& p, int64_t* scratch_size) {
  using Args = SelectArgs<F>;
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  using Key = KeyOf<F>;
  Blocks<F> b{};
  b.tiles_per_row = (int64_t{p.m} + p.block_columns - 1) / p.block_columns;
  b.tighten_at = kTightenAt * p.capacity + kSlack;
  const int64_t entries = p.block_rows * p.block_columns;
  const int64_t bytes = entries * static_cast<int64_t>(sizeof(Key) + sizeof(uint16_t));
  b.between = std::max<int64_t>(1, kRoomBytes / bytes);
  const int64_t room = std::min(p.n * p.m, b.tighten_at + b.between * entries);

  // The choice sees rows of whole tiles, in which a tile is what a block has of a row.
  Args& a = b.args;
  const int64_t padded = b.tiles_per_row * p.block_columns;
  a.in = {nullptr,      static_cast<const Acc*>(p.bias),
          p.mask,       static_cast<const Acc*>(p.threshold),
          nullptr,      p.n,
          p.n * padded, static_cast<int>(padded),
          p.per_column};
  a.out = {p.capacity, 0,         static_cast<Bits*>(p.values),  p.indices,
           nullptr,    p.offsets, static_cast<Acc*>(p.smallest), nullptr,
           false};
  a.plan = {false, p.block_columns, 8, p.n * b.tiles_per_row, 0, 0};
  Scratch scratch(p.scratch);
  a.scratch.header = scratch.take<typename Args::Header>(1);
  a.candidates = {room, scratch.take<Key>(room), scratch.take<uint16_t>(room),
                  scratch.take<uint32_t>(a.plan.tiles), scratch.take<uint32_t>(a.plan.tiles)};
  b.kept = {p.capacity, scratch.take<Key>(p.capacity), scratch.take<uint16_t>(p.capacity), nullptr,
            nullptr};
  a.scratch.tile_kept = scratch.take<uint32_t>(a.plan.tiles);
  a.scratch.block_kept = scratch.take<Count>(2 * int64_t{blocks_for(a.plan.tiles)});
  a.out.rows = scratch.take<int32_t>(p.capacity);
  *scratch_size = scratch.size();
  return b;
}

// Finds the capacity-th largest key of the candidates of the first rows, and counts per tile what
// is kept; returns the grid of the kernel that goes on.
template <class F>
unsigned search(const SelectArgs<F>& a, cudaStream_t stream) {
  const unsigned blocks = blocks_for(a.plan.tiles);
  for (int pass = 0; pass < KeyDigits<F>::kPasses; ++pass) {
    FASTSAE_LAUNCH((digit_kernel<F, false>), blocks, kSelectThreads, 0, stream, a, pass);
  }
  const int64_t at_once = kSelectThreads / a.plan.tile_lanes;
  const unsigned few = blocks_for((a.plan.tiles + at_once - 1) / at_once);
  FASTSAE_LAUNCH((count_kernel<F, false>), few, kSelectThreads, 0, stream, a);
  return few;
}

template <class F>
void tighten(const Blocks<F>& b, int64_t rows, cudaStream_t stream) {
  SelectArgs<F> a = b.args;
  a.plan.tiles = rows * b.tiles_per_row;
  FASTSAE_LAUNCH(decide_tightening_kernel<F>, blocks_of_threads(kDigits), kSelectThreads, 0, stream,
                 a, static_cast<Count>(b.tighten_at + 1));
  const unsigned grid = search(a, stream);
  FASTSAE_LAUNCH(keep_kernel<F>, grid, kSelectThreads, 0, stream, a, b.kept);
  FASTSAE_LAUNCH(keep_back_kernel<F>, blocks_of_threads(a.out.capacity), kSelectThreads, 0, stream,
                 a, b.kept);
}

template <class Call>
auto with_sums(Format format, Call&& f) {
  return format == Format::kFloat64 ? f(Float64{}) : f(Float32{});
}

}  // namespace

int64_t block_select_scratch(const BlockSelectParams& params, Format format) {
  return with_sums(format, [&](auto f) {
    int64_t size;
    blocks_of<decltype(f)>(params, &size);
    return size;
  });
}

const char* launch_begin_blocks(const BlockSelectParams& params, Format format, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  return with_sums(format, [&](auto f) {
    int64_t size;
    const SelectArgs<decltype(f)> a = blocks_of<decltype(f)>(params, &size).args;
    cudaMemsetAsync(a.scratch.header, 0, sizeof *a.scratch.header, stream);
    // Tiles of blocks to come are empty.
    cudaMemsetAsync(a.candidates.tile_count, 0,
                    static_cast<size_t>(a.plan.tiles) * sizeof *a.candidates.tile_count, stream);
    return launch_error();
  });
}

const char* launch_add_block(const BlockSelectParams& params, const SelectBlock& block,
                             Format format, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  return with_sums(format, [&](auto f) {
    using F = decltype(f);
    int64_t size;
    const Blocks<F> b = blocks_of<F>(params, &size);
    const FilterBlock<F> filter{static_cast<const typename F::Bits*>(block.x),
                                block.pitch,
                                block.first,
                                block.rows,
                                b.tiles_per_row,
                                block.first_column / params.block_columns,
                                block.first_column,
                                block.columns};
    const unsigned grid = grid_of(block.rows);
    if (b.args.in.per_column || b.args.in.bias || b.args.in.mask) {
      FASTSAE_LAUNCH((filter_block_kernel<F, true>), grid, kSelectThreads, 0, stream, b.args,
                     filter);
    } else {
      FASTSAE_LAUNCH((filter_block_kernel<F, false>), grid, kSelectThreads, 0, stream, b.args,
                     filter);
    }
    // The first block has no bound yet: it is the one that brings most.
    if (block.index % b.between == 0) tighten(b, block.first + block.rows, stream);
    return launch_error();
  });
}

const char* launch_finish_blocks(const BlockSelectParams& params, Format format, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  return with_sums(format, [&](auto f) {
    using F = decltype(f);
    int64_t size;
    const SelectArgs<F> a = blocks_of<F>(params, &size).args;
    // As a tightening that always takes place.
    FASTSAE_LAUNCH(decide_tightening_kernel<F>, blocks_of_threads(kDigits), kSelectThreads, 0,
                   stream, a, Count{0});
    const unsigned grid = search(a, stream);
    FASTSAE_LAUNCH((write_kernel<F, false>), grid, kSelectThreads, 0, stream, a);
    FASTSAE_LAUNCH(finish_kernel<F>, blocks_of_threads(std::max(a.in.n + 1, a.out.capacity)),
                   kSelectThreads, 0, stream, a);
    return launch_error();
  });
}

}  // namespace fastsae::cuda
