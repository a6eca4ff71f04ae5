// Launches of a selection in a matrix that is met a block at a time, and its scratch. No torch
// header: nvcc takes seconds, and the emulation builds it.
#include "cuda/block_select.h"

#include "cuda/block_select_args.cuh"

namespace fastsae::cuda {
namespace {

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

const char* launch_tighten_blocks(const BlockSelectParams& params, int64_t rows, Format format,
                                  void* on) {
  return with_sums(format, [&](auto f) {
    int64_t size;
    tighten(blocks_of<decltype(f)>(params, &size), rows, static_cast<cudaStream_t>(on));
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
