// The pre-activations of the encode ops, a block of rows x latents at a time. A block is small
// enough for the second-level cache, and the next one is written into the same memory: what the
// product writes and the selection reads need not pass through the device's memory.
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/encode_plan.h"
#include "cuda/encoder.h"
#include "cuda/side_stream.h"

namespace fastsae::cuda {

// Pre-activations without the bias.
struct EncodeBlock {
  const void* pre;  // [rows, pitch], of each row the first `columns`
  int64_t pitch;
  int64_t first, rows;            // rows of x
  int64_t first_column, columns;  // latents
  int64_t index;                  // of all blocks
  bool last_of_rows;
};

// The part of a vector over latents that a block has; null where there is none.
template <class T>
const T* columns_of(const std::optional<Tensor>& v, const EncodeBlock& block) {
  return v ? data_of<T>(*v) + block.first_column : nullptr;
}

// Calls f(block, stream) for all blocks, those of the same rows one after another, to launch on
// that stream what reads them. With kOverlap it is another one than the current one, and f must not
// allocate: memory that is freed belongs to the current stream again.
template <class Call>
void for_each_block(const char* op, const EncoderArguments& in, const EncodePlan& plan, void* main,
                    Call&& f) {
  const bool beside = plan.way == EncodeWay::kOverlap;
  const int64_t n = in.x.size(0), buffers = beside ? 2 : 1;
  Tensor buffer = new_empty(in.x, {buffers, plan.rows, plan.columns}, accumulator_type(in.x));
  SideStream side(main, beside);
  EncodeBlock block{};
  block.pitch = plan.columns;
  for (; block.first < n; block.first += plan.rows) {
    block.rows = std::min(plan.rows, n - block.first);
    for (block.first_column = 0; block.first_column < in.d_sae;
         block.first_column += plan.columns) {
      block.columns = std::min(plan.columns, in.d_sae - block.first_column);
      block.last_of_rows = block.first_column + block.columns == in.d_sae;
      const int turn = static_cast<int>(block.index % buffers);
      Tensor out = torch::stable::select(buffer, 0, turn);
      out = torch::stable::narrow(out, 0, 0, block.rows);
      if (block.columns < plan.columns) out = torch::stable::narrow(out, 1, 0, block.columns);
      if (block.index >= buffers) side.main_follows(turn);  // the buffer has been read
      multiply(in, block.first, block.rows, block.first_column, block.columns, out);
      side.follow_main();
      block.pre = out.const_data_ptr();
      f(static_cast<const EncodeBlock&>(block), side.stream());
      side.mark(turn);
      ++block.index;
    }
  }
  check_launch(op, side.join());
}

}  // namespace fastsae::cuda
