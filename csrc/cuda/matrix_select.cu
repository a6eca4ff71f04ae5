// Launches of a selection in a whole matrix, and its scratch. No torch header: nvcc takes seconds,
// and the emulation builds it.
#include "cuda/matrix_select.h"

#include <algorithm>

#include "cuda/entry_list_kernel.cuh"
#include "cuda/matrix_select_filter_kernel.cuh"
#include "sample.h"

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
void plan_candidates(SelectArgs<F>& a) {
  constexpr int64_t kSlack = 4096;
  const int64_t total = a.in.total, budget = a.out.capacity;
  a.plan.dense = total <= std::max(kSample, 4 * budget);
  a.candidates.capacity = a.plan.dense ? -1 : std::min(total, 2 * budget + kSlack);
  if (a.plan.dense || a.in.per_column) return;
  a.plan.sample_rank = sample_rank(budget, kSample, total);
  if (a.plan.sample_rank >= kSample) return;
  a.plan.sample_vectors = kSample / F::kVector;
  const double likely =
      static_cast<double>(a.plan.sample_rank) * static_cast<double>(total) / kSample;
  a.candidates.capacity =
      std::min(total, std::max(a.candidates.capacity, static_cast<int64_t>(2.0 * likely)));
}

template <class F>
SelectArgs<F> arguments(const MatrixSelectParams& p, int64_t* scratch_size) {
  using Args = SelectArgs<F>;
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  Args a{};
  a.in = {static_cast<const Bits*>(p.x),
          static_cast<const Acc*>(p.bias),
          p.mask,
          static_cast<const Acc*>(p.threshold),
          p.tie_row,
          p.n,
          p.n * p.m,
          p.m,
          p.per_column};
  a.out = {p.capacity, p.first_row, static_cast<Bits*>(p.values),  p.indices,
           p.rows,     p.offsets,   static_cast<Acc*>(p.smallest), static_cast<Acc*>(p.lower_bound),
           p.list};
  plan_candidates(a);
  a.plan.tile = a.plan.dense ? 1024 : Args::kTile;
  a.plan.tile_lanes = a.plan.dense ? 32 : 8;
  a.plan.tiles = (a.in.total + a.plan.tile - 1) / a.plan.tile;
  Scratch scratch(p.scratch);
  const int64_t candidates = std::max<int64_t>(0, a.candidates.capacity);
  a.scratch.header = scratch.take<typename Args::Header>(1);
  a.scratch.sample = scratch.take<uint32_t>(a.plan.sample_vectors * F::kVector);
  a.candidates.keys = scratch.take<typename Args::Key>(candidates);
  a.candidates.places = scratch.take<uint16_t>(candidates);
  a.candidates.tile_base = scratch.take<uint32_t>(a.plan.tiles);
  a.candidates.tile_count = scratch.take<uint32_t>(a.plan.tiles);
  a.scratch.tile_kept = scratch.take<uint32_t>(a.plan.tiles);
  a.scratch.block_kept = scratch.take<Count>(2 * blocks_for(a.plan.tiles));
  if (!a.out.rows) a.out.rows = scratch.take<int32_t>(a.out.capacity);
  *scratch_size = scratch.size();
  return a;
}

template <class F, bool kColumns>
void launch(const SelectArgs<F>& a, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(blocks_for(a.plan.tiles));
  if (a.plan.sample_vectors) {
    const unsigned few = static_cast<unsigned>(blocks_of_threads(a.plan.sample_vectors));
    FASTSAE_LAUNCH((sample_kernel<F, kColumns>), few, kSelectThreads, 0, stream, a);
    FASTSAE_LAUNCH(refine_sample_kernel<F>, few, kSelectThreads, 0, stream, a);
  }
  if (!a.plan.dense)
    FASTSAE_LAUNCH((filter_kernel<F, kColumns>), blocks, kSelectThreads, 0, stream, a);
  for (int pass = 0; pass < KeyDigits<F>::kPasses; ++pass) {
    FASTSAE_LAUNCH((digit_kernel<F, kColumns>), blocks, kSelectThreads, 0, stream, a, pass);
  }
  // A tile for every group of lanes, if there are as many.
  const int64_t at_once = kSelectThreads / a.plan.tile_lanes;
  const unsigned few = static_cast<unsigned>(blocks_for((a.plan.tiles + at_once - 1) / at_once));
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
    cudaMemsetAsync(a.scratch.header, 0, sizeof *a.scratch.header, stream);
    if (a.in.total > 0 && a.out.capacity > 0) {
      if (a.in.per_column || a.in.bias || a.in.mask) launch<F, true>(a, stream);
      else launch<F, false>(a, stream);
    }
    const unsigned blocks =
        static_cast<unsigned>(blocks_of_threads(std::max(a.in.n + 1, a.out.capacity)));
    FASTSAE_LAUNCH(finish_kernel<F>, blocks, kSelectThreads, 0, stream, a);
    return launch_error();
  });
}

const char* launch_gather_entries(const EntryList& list, const int32_t* chosen, const int32_t* half,
                                  int64_t capacity, const EntryList& merged, void* stream) {
  FASTSAE_LAUNCH(gather_entries_kernel, static_cast<unsigned>(blocks_of_threads(capacity)),
                 kSelectThreads, 0, static_cast<cudaStream_t>(stream), list.columns, list.rows,
                 chosen, half, capacity, merged.columns, merged.rows);
  return launch_error();
}

const char* launch_finish_list(const EntryList& list, int64_t capacity, int64_t n, int32_t* offsets,
                               Format format, void* stream) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    FASTSAE_LAUNCH(finish_list_kernel<F>,
                   static_cast<unsigned>(blocks_of_threads(std::max(n + 1, capacity))),
                   kSelectThreads, 0, static_cast<cudaStream_t>(stream),
                   static_cast<typename F::Bits*>(list.values), list.rows, capacity, n, offsets);
    return launch_error();
  });
}

}  // namespace fastsae::cuda
