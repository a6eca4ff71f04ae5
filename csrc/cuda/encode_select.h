// What encode_batch_topk and encode_threshold share on CUDA: the selection in a whole matrix of
// pre-activations. Exact, though the matrix is met a chunk of rows at a time: what a chunk adds is
// merged with what was kept so far, and the smallest of that bounds the next chunk. Or it is met a
// block of rows and latents at a time, which block_select.h takes, or where the product computes
// it.
#pragma once

#include <limits>

#include "cuda/block_select.h"
#include "cuda/encoder_blocks.h"
#include "cuda/encoder_hopper.h"
#include "cuda/matrix_select.h"
#include "selection.h"

namespace fastsae::cuda {

// Entries that are kept, in memory of their own.
struct CandidateBuffers {
  Tensor values, columns, rows;

  CandidateBuffers(const Tensor& like, int64_t size)
      : values(new_empty(like, {size}, accumulator_type(like))),
        columns(new_empty(like, {size}, ScalarType::Int)),
        rows(new_empty(like, {size}, ScalarType::Int)) {}

  EntryList list() {
    return {values.mutable_data_ptr(), mutable_data_of<int32_t>(columns),
            mutable_data_of<int32_t>(rows)};
  }
};

class ChunkedSelect {
 public:
  // threshold: null for 0.
  ChunkedSelect(const char* op, const EncoderArguments& in, const Tensor& x, bool bf16_product,
                int64_t capacity, const Tensor* threshold)
      : op_(op), in_(in), x_(x), capacity_(capacity), threshold_(threshold), device_(x) {
    bfloat16_ = multiplies_bfloat16(x, bf16_product);
    per_column_ = threshold && threshold->dim() != 0;
    acc_ = accumulator_type(x);
    format_ = acc_ == ScalarType::Double ? Format::kFloat64 : Format::kFloat32;
  }

  Selection run() {
    const int64_t n = x_.size(0), chunks = capacity_ == 0 ? 0 : chunks_of(in_).count;
    Selection out(x_, n, capacity_, acc_, acc_);
    if (select_on_hopper(op_, in_, bfloat16_, in_blocks(out), device_.stream())) {
      out.values = torch::stable::to(out.values, x_.scalar_type());
      return out;
    }
    const EncodePlan plan = encode_plan(n, in_.d_sae);
    if (plan.way != EncodeWay::kRows && chunks > 0) {
      select_in_blocks(plan, out);
      out.values = torch::stable::to(out.values, x_.scalar_type());
      return out;
    }
    Tensor rows = new_empty(x_, {capacity_}, ScalarType::Int);
    const EntryList list{out.values.mutable_data_ptr(), mutable_data_of<int32_t>(out.indices),
                         mutable_data_of<int32_t>(rows)};
    int32_t* offsets = mutable_data_of<int32_t>(out.offsets);
    if (chunks > 1) {
      select_in_turn(chunks, list, out.threshold);
      check_launch(op_, launch_finish_list(list, capacity_, n, offsets, format_, device_.stream()));
    } else {
      MatrixSelectParams p = params(list, out.threshold);
      p.n = n;
      p.offsets = offsets;
      if (chunks == 0) {
        select(p);
      } else {
        for_each_chunk(in_,
                       [&](const void* pre, int64_t, int64_t) { select(of_chunk(p, pre, 0, n)); });
      }
    }
    out.values = torch::stable::to(out.values, x_.scalar_type());
    return out;
  }

 private:
  // Without scratch and the sizes of blocks.
  BlockSelectParams in_blocks(Selection& out) const {
    BlockSelectParams p;
    p.n = x_.size(0);
    p.m = static_cast<int32_t>(in_.d_sae);
    p.capacity = capacity_;
    p.threshold = threshold_ ? threshold_->const_data_ptr() : nullptr;
    p.per_column = per_column_;
    p.bias = in_.b_enc ? in_.b_enc->const_data_ptr() : nullptr;
    p.mask = in_.mask ? data_of<bool>(*in_.mask) : nullptr;
    p.values = out.values.mutable_data_ptr();
    p.indices = mutable_data_of<int32_t>(out.indices);
    p.offsets = mutable_data_of<int32_t>(out.offsets);
    p.smallest = out.threshold.mutable_data_ptr();
    return p;
  }

  void select_in_blocks(const EncodePlan& plan, Selection& out) {
    BlockSelectParams p = in_blocks(out);
    p.block_rows = plan.rows;
    p.block_columns = static_cast<int32_t>(plan.columns);
    Tensor space = scratch(x_, block_select_scratch(p, format_));
    p.scratch = space.mutable_data_ptr();
    check_launch(op_, launch_begin_blocks(p, format_, device_.stream()));
    for_each_block(op_, in_, plan, device_.stream(), [&](const EncodeBlock& block, void* stream) {
      const SelectBlock part{block.pre,
                             block.pitch,
                             block.first,
                             block.rows,
                             static_cast<int32_t>(block.first_column),
                             static_cast<int32_t>(block.columns),
                             block.index};
      check_launch(op_, launch_add_block(p, part, format_, stream));
    });
    check_launch(op_, launch_finish_blocks(p, format_, device_.stream()));
  }

  MatrixSelectParams params(const EntryList& to, Tensor& smallest) {
    MatrixSelectParams p;
    p.capacity = capacity_;
    p.threshold = threshold_ ? threshold_->const_data_ptr() : nullptr;
    p.per_column = per_column_;
    p.values = to.values;
    p.indices = to.columns;
    p.rows = to.rows;
    p.smallest = smallest.mutable_data_ptr();
    return p;
  }

  MatrixSelectParams of_chunk(MatrixSelectParams p, const void* pre, int64_t first, int64_t rows) {
    p.x = pre;
    p.n = rows;
    p.m = static_cast<int32_t>(in_.d_sae);
    p.first_row = first;
    p.bias = in_.b_enc ? in_.b_enc->const_data_ptr() : nullptr;
    p.mask = in_.mask ? data_of<bool>(*in_.mask) : nullptr;
    return p;
  }

  void select(MatrixSelectParams p) {
    Tensor space = scratch(x_, matrix_select_scratch(p, format_));
    p.scratch = space.mutable_data_ptr();
    check_launch(op_, launch_matrix_select(p, format_, device_.stream()));
  }

  // What was kept lies in the first half of a list, what a chunk adds in the second; both are
  // merged into the first half of the other list, the last time into `out`.
  void select_in_turn(int64_t chunks, const EntryList& out, Tensor& smallest) {
    CandidateBuffers lists[2]{{x_, 2 * capacity_}, {x_, 2 * capacity_}};
    Tensor chosen = new_empty(x_, {capacity_}, ScalarType::Int);
    Tensor half = new_empty(x_, {capacity_}, ScalarType::Int);
    Tensor lower_bound = new_empty(x_, {}, acc_), none = new_empty(x_, {}, acc_);
    torch::stable::fill_(none, -std::numeric_limits<double>::infinity());
    int64_t chunk = 0;
    for_each_chunk(in_, [&](const void* pre, int64_t first, int64_t rows) {
      const EntryList kept = lists[(chunk + 1) % 2].list();
      MatrixSelectParams p =
          of_chunk(params(chunk ? second_half(kept) : lists[0].list(), smallest), pre, first, rows);
      p.list = true;
      if (!per_column_) {
        // Later entries that equal the bound lose the tie: those above it are enough.
        if (chunk > 0) p.threshold = lower_bound.const_data_ptr();
        p.lower_bound = chunk > 0 ? nullptr : lower_bound.mutable_data_ptr();
      }
      select(p);
      if (chunk > 0) {
        const EntryList merged = chunk + 1 == chunks ? out : lists[chunk % 2].list();
        MatrixSelectParams q = params(
            {merged.values, mutable_data_of<int32_t>(chosen), mutable_data_of<int32_t>(half)},
            smallest);
        q.x = kept.values;
        q.n = 2;
        q.m = static_cast<int32_t>(capacity_);
        q.list = true;
        if (per_column_) q.threshold = none.const_data_ptr();
        else q.lower_bound = lower_bound.mutable_data_ptr();
        q.per_column = false;
        select(q);
        check_launch(op_, launch_gather_entries(kept, q.indices, q.rows, capacity_, merged,
                                                device_.stream()));
      }
      ++chunk;
    });
  }

  EntryList second_half(const EntryList& list) const {
    const int64_t bytes = capacity_ * (acc_ == ScalarType::Double ? 8 : 4);
    return {static_cast<char*>(list.values) + bytes, list.columns + capacity_,
            list.rows + capacity_};
  }

  const char* op_;
  const EncoderArguments& in_;
  const Tensor& x_;
  int64_t capacity_;
  const Tensor* threshold_;
  DeviceScope device_;
  bool per_column_, bfloat16_;
  ScalarType acc_;
  Format format_;
};

}  // namespace fastsae::cuda
