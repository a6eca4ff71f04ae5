// A selection as in matrix_select.h from a matrix that is met a block at a time. No torch, no CUDA.
#pragma once

#include "cuda/format.h"

namespace fastsae::cuda {

// The `capacity` largest of the entries x + bias above the threshold, where mask is true. "A" is
// float32 or float64, the format of x and of all that is returned.
struct BlockSelectParams {
  int64_t n = 0;                    // rows, < 2^31
  int32_t m = 0;                    // columns, < 2^31
  int64_t block_rows = 0;           // of a block, at most
  int32_t block_columns = 0;        // of all blocks but the last ones of a row; <= 8192
  int64_t capacity = 0;             // 0 < capacity < 2^31
  const void* threshold = nullptr;  // A [], or [m] if per_column; null for 0
  bool per_column = false;
  const void* bias = nullptr;  // A [m] or null
  const bool* mask = nullptr;  // [m] or null
  void* values = nullptr;      // A [capacity], ascending (row, column), then 0
  int32_t* indices = nullptr;  // [capacity], columns
  int32_t* offsets = nullptr;  // [n + 1]
  void* smallest = nullptr;    // A []: the smallest kept value, +inf if none
  void* scratch = nullptr;     // block_select_scratch() bytes
  // A block is all rows of a product's tile, and selected there (hopper_select.cu): there are more
  // of them at a time, and few candidates in each row.
  bool in_product = false;
};

// Rows and columns of a block come in ascending order, all columns of some rows before other rows.
struct SelectBlock {
  const void* x;  // A [rows, pitch], aligned to 16 bytes, rows too
  int64_t pitch, first, rows;
  int32_t first_column, columns;
  int64_t index;  // of all blocks
};

int64_t block_select_scratch(const BlockSelectParams& params, Format format);

// Before the first block, for each block, and after the last one. On `stream` (a cudaStream_t);
// null when all is well, else the CUDA error's text.
const char* launch_begin_blocks(const BlockSelectParams& params, Format format, void* stream);
const char* launch_add_block(const BlockSelectParams& params, const SelectBlock& block,
                             Format format, void* stream);
// After the blocks up to some row, where add_block does not do it: cuts the candidates to those
// that may stay, if there are many. What blocks bring between two of these has to have room.
const char* launch_tighten_blocks(const BlockSelectParams& params, int64_t rows, Format format,
                                  void* stream);
const char* launch_finish_blocks(const BlockSelectParams& params, Format format, void* stream);

}  // namespace fastsae::cuda
