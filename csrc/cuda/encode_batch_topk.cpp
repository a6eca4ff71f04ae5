// Matrix-wide selection of (x - b_dec) W_enc^T + b_enc on CUDA: the `budget` largest positive
// entries, or those above theta. Exact, though the matrix is met a chunk of rows at a time: what a
// chunk adds is merged with what was kept so far, and the smallest of that bounds the next chunk.
#include <limits>

#include "cuda/encoder.h"
#include "cuda/matrix_select.h"

namespace fastsae::cuda {
namespace {

struct Selection {
  Tensor values, indices, offsets, threshold;
};

struct Entries {
  Tensor values, columns, rows;

  Entries(const Tensor& like, int64_t size)
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
  // theta: null for 0.
  ChunkedSelect(const char* op, const EncoderArguments& in, const Tensor& x, int64_t cap,
                const Tensor* theta)
      : op_(op), in_(in), x_(x), cap_(cap), theta_(theta), device_(x) {
    per_column_ = theta && theta->dim() != 0;
    acc_ = accumulator_type(x);
    format_ = acc_ == ScalarType::Double ? Format::kFloat64 : Format::kFloat32;
  }

  Selection run() {
    const int64_t n = x_.size(0), chunks = cap_ == 0 ? 0 : chunks_of(in_).count;
    Entries out(x_, cap_);
    Tensor offsets = new_empty(x_, {n + 1}, ScalarType::Int);
    Tensor threshold = new_empty(x_, {}, acc_);
    if (chunks > 1) {
      select_in_turn(chunks, out, threshold);
      check_launch(op_, launch_finish_list(out.list(), cap_, n, mutable_data_of<int32_t>(offsets),
                                           format_, device_.stream()));
    } else {
      MatrixSelectParams p = params(out.list(), threshold);
      p.n = n;
      p.offsets = mutable_data_of<int32_t>(offsets);
      if (chunks == 0) select(p);
      else
        for_each_chunk(in_,
                       [&](const void* pre, int64_t, int64_t) { select(of_chunk(p, pre, 0, n)); });
    }
    return {torch::stable::to(out.values, x_.scalar_type()), out.columns, offsets, threshold};
  }

 private:
  MatrixSelectParams params(const EntryList& to, Tensor& threshold) {
    MatrixSelectParams p;
    p.cap = cap_;
    p.theta = theta_ ? theta_->const_data_ptr() : nullptr;
    p.per_column = per_column_;
    p.values = to.values;
    p.indices = to.columns;
    p.rows = to.rows;
    p.threshold = threshold.mutable_data_ptr();
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
  void select_in_turn(int64_t chunks, Entries& out, Tensor& threshold) {
    Entries lists[2]{Entries(x_, 2 * cap_), Entries(x_, 2 * cap_)};
    Tensor chosen = new_empty(x_, {cap_}, ScalarType::Int);
    Tensor half = new_empty(x_, {cap_}, ScalarType::Int);
    Tensor bound = new_empty(x_, {}, acc_), none = new_empty(x_, {}, acc_);
    torch::stable::fill_(none, -std::numeric_limits<double>::infinity());
    int64_t chunk = 0;
    for_each_chunk(in_, [&](const void* pre, int64_t first, int64_t rows) {
      const EntryList kept = lists[(chunk + 1) % 2].list();
      MatrixSelectParams p = of_chunk(
          params(chunk ? second_half(kept) : lists[0].list(), threshold), pre, first, rows);
      p.list = true;
      if (!per_column_) {
        // Later entries that equal the bound lose the tie: those above it are enough.
        if (chunk > 0) p.theta = bound.const_data_ptr();
        p.bound = chunk > 0 ? nullptr : bound.mutable_data_ptr();
      }
      select(p);
      if (chunk > 0) {
        const EntryList merged = chunk + 1 == chunks ? out.list() : lists[chunk % 2].list();
        MatrixSelectParams q = params(
            {merged.values, mutable_data_of<int32_t>(chosen), mutable_data_of<int32_t>(half)},
            threshold);
        q.x = kept.values;
        q.n = 2;
        q.m = static_cast<int32_t>(cap_);
        q.list = true;
        if (per_column_) q.theta = none.const_data_ptr();
        else q.bound = bound.mutable_data_ptr();
        q.per_column = false;
        select(q);
        check_launch(
            op_, launch_gather_entries(kept, q.indices, q.rows, cap_, merged, device_.stream()));
      }
      ++chunk;
    });
  }

  EntryList second_half(const EntryList& list) const {
    const int64_t bytes = cap_ * (acc_ == ScalarType::Double ? 8 : 4);
    return {static_cast<char*>(list.values) + bytes, list.columns + cap_, list.rows + cap_};
  }

  const char* op_;
  const EncoderArguments& in_;
  const Tensor& x_;
  int64_t cap_;
  const Tensor* theta_;
  DeviceScope device_;
  bool per_column_;
  ScalarType acc_;
  Format format_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_batch_topk(
    const Tensor& x, const Tensor& W_enc, std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
    int64_t budget, std::optional<Tensor> mask, bool bf16_product, std::optional<Tensor> hint) {
  constexpr const char* op = "encode_batch_topk";
  format_of(op, "x", x);
  const DeviceScope device(x);
  const EncoderArguments in = encoder_input(op, x, W_enc, b_enc, b_dec, mask, bf16_product);
  FASTSAE_CHECK(budget >= 0, op, ": expected budget >= 0, got ", budget);
  const int64_t cap = std::min(budget, x.size(0) * in.d_sae);
  check_entries(op, cap);
  check_hint(op, hint);  // and no more: a sample serves better here
  if (hint) check_device(op, "threshold_guess", *hint, x);
  const Selection s = ChunkedSelect(op, in, x, cap, nullptr).run();
  return {s.values, s.indices, s.offsets, s.threshold};
}

std::tuple<Tensor, Tensor, Tensor> encode_threshold(const Tensor& x, const Tensor& W_enc,
                                                    std::optional<Tensor> b_enc,
                                                    std::optional<Tensor> b_dec,
                                                    const Tensor& theta_in, int64_t cap_in,
                                                    bool bf16_product) {
  constexpr const char* op = "encode_threshold";
  format_of(op, "x", x);
  const DeviceScope device(x);
  const EncoderArguments in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt, bf16_product);
  const Tensor theta = as_contiguous(theta_in);
  check_theta(op, theta, x, in.d_sae);
  check_device(op, "threshold", theta, x);
  FASTSAE_CHECK(cap_in >= 0, op, ": expected capacity >= 0, got ", cap_in);
  const int64_t cap = std::min(cap_in, x.size(0) * in.d_sae);
  check_entries(op, cap);
  const Selection s = ChunkedSelect(op, in, x, cap, &theta).run();
  return {s.values, s.indices, s.offsets};
}

}  // namespace

FASTSAE_CUDA_LIBRARY_IMPL(m) {
  m.impl("encode_batch_topk", TORCH_BOX(&encode_batch_topk));
  m.impl("encode_threshold", TORCH_BOX(&encode_threshold));
}

}  // namespace fastsae::cuda
