// Launches of a selection in a whole matrix, and its scratch. No torch header: nvcc takes seconds,
// and the emulation builds it.
#include "cuda/matrix_select.h"

#include <algorithm>
#include <cmath>

#include "cuda/matrix_select_kernel.cuh"

namespace fastsae::cuda {
namespace {

// Entries of a sample. Few in the emulation, so that small matrices have one.
#ifdef FASTSAE_EMULATED
constexpr int64_t kSample = 1 << 12;
#else
constexpr int64_t kSample = 1 << 18;
#endif

int64_t blocks_for(int64_t items) {
  return std::max<int64_t>(1, std::min<int64_t>(items, 6 * multiprocessors()));
}
int64_t blocks_of_threads(int64_t items) {
  return blocks_for((items + kSelectThreads - 1) / kSelectThreads);
}

// How many candidates there may be, and the rank in the sample that is expected to leave enough.
template <class F>
void plan_guess(SelectArgs<F>& a) {
  constexpr int64_t kSlack = 4096;
  a.sample_vectors = 0;
  a.dense = a.total <= std::max(kSample, 4 * a.cap);
  a.capacity = a.dense ? -1 : std::min(a.total, 2 * a.cap + kSlack);
  if (a.dense || a.per_column) return;
  const double expected =
      static_cast<double>(a.cap) * static_cast<double>(kSample) / static_cast<double>(a.total);
  a.sample_rank = static_cast<int64_t>(1.25 * expected + 4.0 * std::sqrt(expected)) + 8;
  if (a.sample_rank >= kSample) return;
  a.sample_vectors = kSample / F::kVector;
  const double likely = static_cast<double>(a.sample_rank) * static_cast<double>(a.total) / kSample;
  a.capacity = std::min(a.total, std::max(a.capacity, static_cast<int64_t>(2.0 * likely)));
}

template <class F>
SelectArgs<F> arguments(const MatrixSelectParams& p, int64_t* scratch_size) {
  using Args = SelectArgs<F>;
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  Args a{};
  a.x = static_cast<const Bits*>(p.x);
  a.bias = static_cast<const Acc*>(p.bias);
  a.mask = p.mask;
  a.theta = static_cast<const Acc*>(p.theta);
  a.tie_row = p.tie_row;
  a.n = p.n;
  a.total = p.n * p.m;
  a.m = p.m;
  a.per_column = p.per_column;
  a.list = p.list;
  a.cap = p.cap;
  a.first_row = p.first_row;
  a.values = static_cast<Bits*>(p.values);
  a.indices = p.indices;
  a.rows = p.rows;
  a.offsets = p.offsets;
  a.threshold = static_cast<Acc*>(p.threshold);
  a.bound = static_cast<Acc*>(p.bound);
  plan_guess(a);
  a.tile = a.dense ? 1024 : Args::kTile;
  a.tile_lanes = a.dense ? 32 : 8;
  a.tiles = (a.total + a.tile - 1) / a.tile;
  Scratch scratch(p.scratch);
  a.header = scratch.take<typename Args::Header>(1);
  a.sample = scratch.take<uint32_t>(a.sample_vectors * F::kVector);
  a.keys = scratch.take<typename Args::Key>(std::max<int64_t>(0, a.capacity));
  a.places = scratch.take<uint16_t>(std::max<int64_t>(0, a.capacity));
  a.tile_base = scratch.take<uint32_t>(a.tiles);
  a.tile_count = scratch.take<uint32_t>(a.tiles);
  a.tile_kept = scratch.take<uint32_t>(a.tiles);
  a.block_kept = scratch.take<Count>(2 * blocks_for(a.tiles));
  if (!a.rows) a.rows = scratch.take<int32_t>(a.cap);
  *scratch_size = scratch.size();
  return a;
}

template <class F, bool kColumns>
void launch(const SelectArgs<F>& a, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(blocks_for(a.tiles));
  if (a.sample_vectors) {
    const unsigned few = static_cast<unsigned>(blocks_of_threads(a.sample_vectors));
    FASTSAE_LAUNCH((sample_kernel<F, kColumns>), few, kSelectThreads, 0, stream, a);
    FASTSAE_LAUNCH(refine_sample_kernel<F>, few, kSelectThreads, 0, stream, a);
  }
  if (!a.dense) FASTSAE_LAUNCH((filter_kernel<F, kColumns>), blocks, kSelectThreads, 0, stream, a);
  for (int pass = 0; pass < SelectArgs<F>::kPasses; ++pass) {
    FASTSAE_LAUNCH((digit_kernel<F, kColumns>), blocks, kSelectThreads, 0, stream, a, pass);
  }
  // A tile for every group of lanes, if there are as many.
  const int64_t at_once = kSelectThreads / a.tile_lanes;
  const unsigned few = static_cast<unsigned>(blocks_for((a.tiles + at_once - 1) / at_once));
  FASTSAE_LAUNCH((count_kernel<F, kColumns>), few, kSelectThreads, 0, stream, a);
  FASTSAE_LAUNCH((write_kernel<F, kColumns>), few, kSelectThreads, 0, stream, a);
}

}  // namespace

int64_t matrix_select_scratch(const MatrixSelectParams& params, Format format) {
  return with_format(format, [&](auto f) {
    int64_t size;
    arguments<decltype(f)>(params, &size);
    return size;
  });
}

const char* launch_matrix_select(const MatrixSelectParams& params, Format format, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    int64_t size;
    const SelectArgs<F> a = arguments<F>(params, &size);
    cudaMemsetAsync(a.header, 0, sizeof *a.header, stream);
    if (a.total > 0 && a.cap > 0) {
      if (a.per_column || a.bias || a.mask) launch<F, true>(a, stream);
      else launch<F, false>(a, stream);
    }
    const unsigned blocks = static_cast<unsigned>(blocks_of_threads(std::max(a.n + 1, a.cap)));
    FASTSAE_LAUNCH(finish_kernel<F>, blocks, kSelectThreads, 0, stream, a);
    return launch_error();
  });
}

const char* launch_gather_entries(const EntryList& list, const int32_t* chosen, const int32_t* half,
                                  int64_t cap, const EntryList& merged, void* stream) {
  FASTSAE_LAUNCH(gather_entries_kernel, static_cast<unsigned>(blocks_of_threads(cap)),
                 kSelectThreads, 0, static_cast<cudaStream_t>(stream), list.columns, list.rows,
                 chosen, half, cap, merged.columns, merged.rows);
  return launch_error();
}

const char* launch_finish_list(const EntryList& list, int64_t cap, int64_t n, int32_t* offsets,
                               Format format, void* stream) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    FASTSAE_LAUNCH(finish_list_kernel<F>,
                   static_cast<unsigned>(blocks_of_threads(std::max(n + 1, cap))), kSelectThreads,
                   0, static_cast<cudaStream_t>(stream),
                   static_cast<typename F::Bits*>(list.values), list.rows, cap, n, offsets);
    return launch_error();
  });
}

}  // namespace fastsae::cuda
