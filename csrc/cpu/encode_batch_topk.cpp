// Matrix-wide selection of (x - b_dec) W_enc^T + b_enc in the variable layout: the `budget` largest
// positive entries, or those above theta. Exact, though the matrix is met a chunk at a time.
#include "cpu/encode_block.h"
#include "cpu/matrix_select.h"

namespace fastsae::cpu {
namespace {

struct Selection {
  Tensor values, indices, offsets, threshold;
};

// The entries of tokens first, first + 1, ... (one block) above tau: one number, or one per latent.
template <class T, class W>
FoundEntries<Acc<T>> scan_block(EncodeBlock<T, W>& block, int64_t first, int64_t count,
                                const Acc<T>* tau, bool per_latent) {
  using A = Acc<T>;
  block.pack(count, [first](int64_t t) { return first + t; });
  std::vector<A> same;
  if (!per_latent) {
    same.assign(static_cast<size_t>(block.padded()), *tau);
    tau = same.data();
  }
  // Found by ascending latent, all tokens mixed; then sorted by token, which keeps that order.
  std::vector<A> values;
  std::vector<int32_t> latents, tokens;
  FoundEntries<A> found;
  found.counts.assign(static_cast<size_t>(count), 0);
  block.filter(0, tau, per_latent, Pass::kAbove, [&](A value, int32_t latent, int64_t token) {
    values.push_back(value);
    latents.push_back(latent);
    tokens.push_back(static_cast<int32_t>(token));
    ++found.counts[token];
  });
  std::vector<int32_t> next(static_cast<size_t>(count) + 1, 0);
  for (int64_t t = 0; t < count; ++t) next[t + 1] = next[t] + found.counts[t];
  found.values.resize(values.size());
  found.columns.resize(values.size());
  for (size_t j = 0; j < values.size(); ++j) {
    const int32_t to = next[tokens[j]]++;
    found.values[to] = values[j];
    found.columns[to] = latents[j];
  }
  return found;
}

// All blocks, as many at a time as there are threads; `selected` raises the bound between. The
// bound is at least `tau` if that is not null.
template <class T, class W>
void scan_blocks(const EncoderInput& in, MatrixSelect<Acc<T>>& selected, const Acc<T>* theta,
                 bool per_latent, const Acc<T>* tau, int64_t most) {
  using A = Acc<T>;
  const int64_t n = in.x.size(0);
  const BlockPlan plan = plan_blocks(n, most);
  const int64_t round = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::vector<FoundEntries<A>> found(static_cast<size_t>(round));
  for (int64_t b = 0; b < plan.count; b += round) {
    const A lowest = per_latent ? A(0) : std::max(selected.lowest(), tau ? *tau : theta[0]);
    const int64_t blocks = std::min(round, plan.count - b);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      EncodeBlock<T, W> block(in);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = (b + i) * plan.size;
        found[i] = scan_block(block, first, std::min(plan.size, n - first),
                              per_latent ? theta : &lowest, per_latent);
      }
    });
    for (int64_t i = 0; i < blocks; ++i) selected.append((b + i) * plan.size, found[i]);
  }
}

// A guess of the bound from all latents of a few tokens.
template <class T, class W>
Acc<T> sampled_bound(const EncoderInput& in, MatrixSelect<Acc<T>>& selected) {
  using A = Acc<T>;
  constexpr int64_t kTokens = 32;
  const int64_t n = in.x.size(0), m = in.latent_count(), tile = tile_kernels<W>().latents;
  const int64_t count = std::min(n, kTokens);
  const int64_t padded =
      (count + tile_kernels<W>().tokens - 1) / tile_kernels<W>().tokens * tile_kernels<W>().tokens;
  AlignedBuffer<A> space;
  A* sample = space.reserve((m + tile) * padded);
  torch::stable::parallel_for(0, (m + tile - 1) / tile, 16, [&](int64_t begin, int64_t end) {
    EncodeBlock<T, W> block(in);
    block.pack(count, [=](int64_t t) { return t * n / count; });
    block.store(begin * tile, std::min(m, end * tile), sample + begin * tile * padded);
  });
  int64_t size = 0;  // without the padding
  for (int64_t f = 0; f < m; ++f) {
    for (int64_t t = 0; t < count; ++t) sample[size++] = sample[f * padded + t];
  }
  return selected.guess(sample, size, n * m);
}

// The largest entries of all. A guess of their bound that turns out to leave too few is dropped,
// and the next one tried: it costs time, the result is the same. A hint is the bound of an earlier
// batch.
template <class T, class W>
void largest_in_blocks(const EncoderInput& in, MatrixSelect<Acc<T>>& selected,
                       const Acc<T>* theta) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Acc<T> bound = attempt == 0 ? selected.hint() : sampled_bound<T, W>(in, selected);
    if (!(bound > theta[0])) continue;
    scan_blocks<T, W>(in, selected, theta, false, &bound, kBlockTokens);
    if (selected.full()) return;
    selected.clear();
  }
  scan_blocks<T, W>(in, selected, theta, false, nullptr, 64);
}

// few: what is above theta is expected to fit.
template <class T, class W>
Selection select(const EncoderInput& in, int64_t cap, const Acc<T>* theta, bool per_column,
                 bool few, const Acc<T>* hint) {
  using A = Acc<T>;
  const int64_t n = in.x.size(0);
  Selection out{new_empty(in.x, {cap}, in.x.scalar_type()), new_empty(in.x, {cap}, ScalarType::Int),
                new_empty(in.x, {n + 1}, ScalarType::Int),
                new_empty(in.x, {}, scalar_type_of<A>())};
  MatrixSelect<A> selected(n, in.latent_count(), cap, theta, per_column);
  if (hint) selected.expect(*hint);
  if (cap == 0) {
    // Nothing can be kept.
  } else if (encodes_in_blocks(in)) {
    if (few) scan_blocks<T, W>(in, selected, theta, per_column, nullptr, kBlockTokens);
    else largest_in_blocks<T, W>(in, selected, theta);
  } else {
    for_each_chunk<T>(in, [&](const T* pre, const A* bias, int64_t first, int64_t rows) {
      selected.add(pre, bias, first, rows);
    });
  }
  int32_t* indices = mutable_data_of<int32_t>(out.indices);
  int32_t* offsets = mutable_data_of<int32_t>(out.offsets);
  *mutable_data_of<A>(out.threshold) =
      selected.finish(mutable_data_of<T>(out.values), indices, offsets, cap);
  if (in.masked) {
    for (int32_t j = 0; j < offsets[n]; ++j) indices[j] = in.latents[indices[j]];
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_batch_topk(
    const Tensor& x, const Tensor& W_enc, std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
    int64_t budget, std::optional<Tensor> mask, bool bf16_product, std::optional<Tensor> hint_in) {
  constexpr const char* op = "encode_batch_topk";
  const EncoderInput in = encoder_input(op, x, W_enc, b_enc, b_dec, mask, bf16_product);
  FASTSAE_CHECK(budget >= 0, op, ": expected budget >= 0, got ", budget);
  const int64_t cap = std::min(budget, in.x.size(0) * in.d_sae);
  check_entries(op, cap);
  const std::optional<Tensor> hint = checked_hint(op, hint_in, x);
  const Selection s = dispatch_product(op, in, [&](auto type, auto word) {
    using T = typename decltype(type)::type;
    using W = typename decltype(word)::type;
    const Acc<T> zero = 0;
    return select<T, W>(in, cap, &zero, false, false, hint ? data_of<Acc<T>>(*hint) : nullptr);
  });
  return {s.values, s.indices, s.offsets, s.threshold};
}

std::tuple<Tensor, Tensor, Tensor> encode_threshold(const Tensor& x, const Tensor& W_enc,
                                                    std::optional<Tensor> b_enc,
                                                    std::optional<Tensor> b_dec,
                                                    const Tensor& theta_in, int64_t cap_in,
                                                    bool bf16_product) {
  constexpr const char* op = "encode_threshold";
  const EncoderInput in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt, bf16_product);
  const Tensor theta = as_contiguous(theta_in);
  check_theta(op, theta, x, in.d_sae);
  FASTSAE_CHECK(cap_in >= 0, op, ": expected capacity >= 0, got ", cap_in);
  const int64_t cap = std::min(cap_in, in.x.size(0) * in.d_sae);
  check_entries(op, cap);
  const Selection s = dispatch_product(op, in, [&](auto type, auto word) {
    using T = typename decltype(type)::type;
    using W = typename decltype(word)::type;
    const Acc<T>* tau = data_of<Acc<T>>(theta);
    return select<T, W>(in, cap, tau, theta.dim() != 0, true, nullptr);
  });
  return {s.values, s.indices, s.offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("encode_batch_topk", TORCH_BOX(&encode_batch_topk));
  m.impl("encode_threshold", TORCH_BOX(&encode_threshold));
}

}  // namespace fastsae::cpu
