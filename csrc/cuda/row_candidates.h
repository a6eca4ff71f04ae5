// The k largest of rows whose elements are met a block of columns at a time: each row has a list of
// candidates and a lower bound that are carried from block to block. No torch, no CUDA.
#pragma once

#include "cuda/format.h"

namespace fastsae::cuda {

// What is kept of n rows, in float32. Nothing has to be initialized before the first block.
struct RowCandidates {
  uint64_t* entries;  // [n, capacity], in any order; row_candidates.cuh says how one is encoded
  uint32_t* count;    // [n] entries of each row
  float* bound;       // [n]: a number that k elements of the row reach; -inf if none is known
  int32_t capacity;   // >= k

  int64_t bytes(int64_t n) const { return n * (capacity * 8 + 4 + 4); }
};

// A block of x: of n rows, the columns from first_column on. Blocks of a row come in ascending
// order, the first one with at least k columns.
struct FilterRowsParams {
  const float* x;     // [n, pitch], aligned to 16 bytes; pitch is a multiple of 4
  const float* bias;  // [width], added to every row; or null
  const bool* mask;   // [width]: others count as -inf; or null
  int64_t n, pitch;
  int32_t width, first_column;
  int32_t k;
  bool absolute;  // by magnitude
  RowCandidates kept;
};

// values, indices [n, k]: the k largest of the candidates of each row, in ascending index.
struct ChooseRowsParams {
  RowCandidates kept;
  const bool* mask;  // [m]: others have the value 0; or null
  int64_t n;
  int32_t k;
  bool relu;  // negative values become 0
  float* values;
  int32_t* indices;
};

constexpr int kMostCandidatesTaken = 512;  // the largest k

// Room for a list that is tightened now and then: about k log(columns / block) elements of a row in
// random order are candidates at some time.
int32_t row_candidates_capacity(int32_t k);

// On `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_filter_rows(const FilterRowsParams& params, void* stream);
const char* launch_choose_rows(const ChooseRowsParams& params, void* stream);

}  // namespace fastsae::cuda
