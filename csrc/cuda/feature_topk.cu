// Launches of the column bounds of feature_topk, and how the rows are divided. No torch header:
// nvcc takes seconds, and the emulation builds it.
#include "cuda/feature_topk.h"

#include <algorithm>

#include "cuda/feature_topk_columns_kernel.cuh"
#include "cuda/feature_topk_lists_kernel.cuh"

namespace fastsae::cuda {
namespace {

constexpr int64_t kFewRows = 256;                // fewer are settled as a whole
constexpr int64_t kMostRows = int64_t{1} << 30;  // counted in ints
constexpr int64_t kMostGroups = 512;   // all maxima of a column are searched again and again
constexpr int64_t kShortestGroup = 8;  // rows of a group at least: its maximum is written
constexpr int64_t kMostRowStep = 4;
constexpr int64_t kUnknownMean = 8;
constexpr double kMostListed = 0.003;           // of the entries: one costs as much as many reads
constexpr int64_t kLeastPart = 16, kPart = 64;  // rows that a thread compares with its bounds
constexpr int64_t kFullThreads = 4 * kGroupThreads;  // at a time on a multiprocessor

int64_t blocks_of(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

// Divides the rows; list_capacity stays 0 where lists would not pay.
template <class F>
void plan(ColumnBoundArgs<F>& a, int64_t total) {
  const int64_t n = a.n;
  // A capacity for everything says nothing about m.
  const int64_t mean =
      total < n * a.columns ? std::max<int64_t>(1, blocks_of(total, a.columns)) : kUnknownMean;
  const int64_t pieces = blocks_of(a.columns, F::kVector), full = kFullThreads * multiprocessors();
  // Enough groups for a bound that lets little more than m pass, for columns with a larger m, and
  // for all threads to have work.
  const int64_t groups = std::max<int64_t>({32, 8 * mean, 2 * full / pieces});
  a.groups = static_cast<int>(std::min({groups, kMostGroups, n / kShortestGroup}));
  if (n < kFewRows || n > kMostRows || 4 * mean > a.groups) return;
  // A bound from a part of the rows saves most of the first read, and lets more pass.
  const auto listed = [&](int64_t step) {
    return static_cast<double>(mean * step) / static_cast<double>(n);
  };
  a.row_step = 1;
  while (a.row_step < kMostRowStep && listed(2 * a.row_step) < kMostListed &&
         n / (2 * a.row_step) >= kShortestGroup * a.groups) {
    a.row_step *= 2;
  }
  a.list_capacity = static_cast<int>(std::min(n, 32 * blocks_of(4 * a.row_step * mean + 64, 32)));
  // Several blocks one after the other, each with room for four times what it is expected to find.
  const double found = listed(a.row_step) * kGroupThreads * F::kVector;  // per row
  const int64_t fitting =
      std::max<int64_t>(1, static_cast<int64_t>(FoundEntries<F>::kCapacity / 4 / found));
  const int64_t rows = std::clamp(n * pieces / (4 * full), kLeastPart, kPart);
  a.parts = static_cast<int>(blocks_of(n, std::min(rows, fitting)));
}

template <class F>
ColumnBoundArgs<F> arguments(const ColumnBoundParams& p, int64_t* scratch_size) {
  using Args = ColumnBoundArgs<F>;
  using Bits = typename F::Bits;
  Args a{};
  a.x = static_cast<const Bits*>(p.x);
  a.n = p.n;
  a.columns = p.columns;
  a.m = p.m;
  a.lower_bound = static_cast<typename F::Acc*>(p.lower_bound);
  a.tie_row = p.tie_row;
  plan(a, p.total);
  Scratch scratch(p.scratch);
  if (a.list_capacity > 0) {
    a.maxima = scratch.take<typename Args::Code>(int64_t{a.groups} * a.columns);
    a.list_bound = scratch.take<Bits>(a.columns);
    a.list_count = scratch.take<unsigned>(a.columns);
    a.list_values = scratch.take<Bits>(int64_t{a.list_capacity} * a.columns);
    a.list_rows = scratch.take<int32_t>(int64_t{a.list_capacity} * a.columns);
  }
  *scratch_size = scratch.size();
  return a;
}

template <class F, bool kWide>
void launch_lists(const ColumnBoundArgs<F>& a, cudaStream_t stream) {
  const int64_t packs = a.columns / Pack<F, kWide>::kSize;
  FASTSAE_LAUNCH((group_maxima_kernel<F, kWide>),
                 grid_of(blocks_of(packs * a.groups, kGroupThreads)), kGroupThreads, 0, stream, a);
  FASTSAE_LAUNCH(list_bound_kernel<F>, grid_of(blocks_of(a.columns, kBoundThreads)), kBoundThreads,
                 0, stream, a);
  FASTSAE_LAUNCH((list_kernel<F, kWide>), grid_of(blocks_of(packs * a.parts, kGroupThreads)),
                 kGroupThreads, 0, stream, a);
  FASTSAE_LAUNCH(choose_kernel<F>, grid_of(blocks_of(a.columns, kChooseThreads / 32)),
                 kChooseThreads, 0, stream, a);
}

}  // namespace

int64_t column_bound_scratch(const ColumnBoundParams& params, Format format) {
  return with_format(format, [&](auto f) {
    int64_t size;
    arguments<decltype(f)>(params, &size);
    return size;
  });
}

const char* launch_column_bound(const ColumnBoundParams& params, Format format, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    int64_t size;
    const ColumnBoundArgs<F> a = arguments<F>(params, &size);
    if (a.list_capacity > 0) {
      const bool aligned =
          a.columns % F::kVector == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
      if (aligned) launch_lists<F, true>(a, stream);
      else launch_lists<F, false>(a, stream);
    }
    FASTSAE_LAUNCH(column_bound_kernel<F>, grid_of(blocks_of(a.columns, 32)), kColumnThreads, 0,
                   stream, a);
    return launch_error();
  });
}

}  // namespace fastsae::cuda
