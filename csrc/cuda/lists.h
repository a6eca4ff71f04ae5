// Feature-major lists as a launcher gets them. No torch, no CUDA.
#pragma once

#include "cuda/format.h"

namespace fastsae::cuda {

// A longer list is summed in segments of so many entries, by as many warps, and the sums of
// segments are added in order: a latent that every token has does not hold up the others.
constexpr int kSegment = 256;

struct ListsParams {
  const int32_t* offsets;  // [d_sae + 1]
  const int32_t* rows;     // [capacity], an entry out of [0, n) is ignored
  const int32_t* slots;    // [capacity], an entry out of [0, size) is ignored
  int32_t d_sae, capacity, n;
  const void* values;  // [size]
  int32_t size;
  bool wide;  // values are in the accumulator's format, not the matrix's

  // Segments that are not the first of their list, at most. No two lists share a multiple of
  // kSegment, so segment i > 0 of a list from position b on has the place b / kSegment + i - 1.
  int64_t later_segments() const { return capacity / kSegment; }
};

}  // namespace fastsae::cuda
