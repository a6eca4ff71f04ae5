// What the operators that select in a whole matrix and their launcher agree on. No torch, no CUDA.
#pragma once

#include "cuda/format.h"

namespace fastsae::cuda {

// The `capacity` largest of the entries x + bias that are above the threshold, where mask is true.
// "A" below is the accumulator's format: float64 for float64, else float32.
struct MatrixSelectParams {
  const void* x = nullptr;          // [n, m], n and m < 2^31; or null if m or capacity is 0
  int64_t n = 0;                    // rows
  int32_t m = 0;                    // columns
  int64_t capacity = 0;             // < 2^31
  const void* threshold = nullptr;  // A [], or [m] if per_column; null for 0
  bool per_column = false;
  const int32_t* tie_row = nullptr;  // [m]: equal ones too, in rows up to this; or null
  const void* bias = nullptr;        // A [m] or null; x is float32 or float64 then
  const bool* mask = nullptr;        // [m] or null
  void* values = nullptr;            // [capacity], ascending (row, column), then padding
  int32_t* indices = nullptr;        // [capacity], columns
  int32_t* rows = nullptr;           // [capacity], scratch if nobody asks for it
  int32_t* offsets = nullptr;        // [n + 1]; or null
  void* smallest = nullptr;          // A []: the smallest kept value, +inf if none; or null
  // A []: what later entries have to exceed to be among the largest, the smallest kept value if
  // `capacity` are kept, else the threshold; or null.
  void* lower_bound = nullptr;
  int64_t first_row = 0;    // added to `rows`
  bool list = false;        // padding is (NaN, row 2^31 - 1) instead of (0, anything)
  void* scratch = nullptr;  // matrix_select_scratch() bytes
};

int64_t matrix_select_scratch(const MatrixSelectParams& params, Format format);

// Launches on `stream` (a cudaStream_t); null when all is well, else the CUDA error's text.
const char* launch_matrix_select(const MatrixSelectParams& params, Format format, void* stream);

// Selections from several matrices with the same columns, merged a pair at a time. `list` has two
// halves of `capacity` entries, ascending (row, column) over both, padded as above; `chosen` and
// `half` are the columns and rows of a selection from it as a [2, capacity] matrix.
struct EntryList {
  void* values;      // A [2, capacity]
  int32_t* columns;  // [2, capacity]
  int32_t* rows;     // [2, capacity]
};
const char* launch_gather_entries(const EntryList& list, const int32_t* chosen, const int32_t* half,
                                  int64_t capacity, const EntryList& merged, void* stream);
// From the first half of a list to the variable layout, in place: offsets [n + 1], padding 0.
const char* launch_finish_list(const EntryList& list, int64_t capacity, int64_t n, int32_t* offsets,
                               Format format, void* stream);

}  // namespace fastsae::cuda
