// Launches of the kernels that carry candidates of rows from block to block. No torch header: nvcc
// takes seconds, and the emulation builds it.
#include "cuda/row_candidates.h"

#include <algorithm>

#include "cuda/row_candidates_kernel.cuh"

namespace fastsae::cuda {
namespace {

// Candidates of a list, and of a block, for each that is selected. Few in the emulation, so that
// lists are tightened and blocks overflow.
#ifdef FASTSAE_EMULATED
constexpr int kListPerK = 2, kRoomPerK = 1, kLeastRoom = 8;
#else
constexpr int kListPerK = 8, kRoomPerK = 4, kLeastRoom = 256;
#endif
constexpr int kMostByGroups = 64;  // the largest k that a maximum per thread bounds well

RowListShape shape_of(int32_t k) {
  int power = 1;
  while (power < k) power <<= 1;
  return {std::max(kRoomPerK * k, kLeastRoom), k > kMostByGroups ? power : k + kSpare};
}

size_t bytes_of(int entries, const RowListShape& shape) {
  return sizeof(uint64_t) * static_cast<size_t>(entries + shape.winner_capacity);
}

template <int kMaxima>
void filter(const FilterRowsParams& p, cudaStream_t stream) {
  const RowListShape shape = shape_of(p.k);
  const size_t shared = bytes_of(shape.room + p.kept.capacity, shape);
  allow_shared(&filter_rows_kernel<kMaxima>, shared);
  FASTSAE_LAUNCH(filter_rows_kernel<kMaxima>, grid_of(p.n), kRowListThreads, shared, stream, p,
                 shape);
}

template <bool kRanked>
void choose(const ChooseRowsParams& p, cudaStream_t stream) {
  const RowListShape shape = shape_of(p.k);
  const size_t shared = bytes_of(p.kept.capacity, shape);
  allow_shared(&choose_rows_kernel<kRanked>, shared);
  FASTSAE_LAUNCH(choose_rows_kernel<kRanked>, grid_of(p.n), kRowListThreads, shared, stream, p,
                 shape);
}

}  // namespace

int32_t row_candidates_capacity(int32_t k) {
  return std::max(kListPerK * k, kLeastRoom);
}

const char* launch_filter_rows(const FilterRowsParams& p, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  if (p.k > kMostByGroups) filter<4>(p, stream);
  else filter<1>(p, stream);
  return launch_error();
}

const char* launch_choose_rows(const ChooseRowsParams& p, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  if (p.k > kMostByGroups) choose<false>(p, stream);
  else choose<true>(p, stream);
  return launch_error();
}

}  // namespace fastsae::cuda
