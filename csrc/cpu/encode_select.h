// What encode_batch_topk and encode_threshold share: the selection in a whole matrix of
// pre-activations, exact, though the matrix is met a block or a chunk at a time.
#pragma once

#include "cpu/encode_block.h"
#include "cpu/matrix_select.h"
#include "selection.h"

namespace fastsae::cpu {

// The entries of tokens first, first + 1, ... (one block) above lower_bound: one number, or one per
// latent.
template <class T, class W>
FoundEntries<Acc<T>> scan_block(EncodeBlock<T, W>& block, int64_t first, int64_t count,
                                const Acc<T>* lower_bound, bool per_latent) {
  using A = Acc<T>;
  block.pack(count, [first](int64_t t) { return first + t; });
  std::vector<A> same;
  if (!per_latent) {
    same.assign(static_cast<size_t>(block.padded()), *lower_bound);
    lower_bound = same.data();
  }
  // Found by ascending latent, all tokens mixed; then sorted by token, which keeps that order.
  std::vector<A> values;
  std::vector<int32_t> latents, tokens;
  FoundEntries<A> found;
  found.counts.assign(static_cast<size_t>(count), 0);
  block.filter(0, lower_bound, per_latent, Pass::kAbove,
               [&](A value, int32_t latent, int64_t token) {
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
// bound is at least `at_least` if that is not null.
template <class T, class W>
void scan_blocks(const EncoderInput& in, MatrixSelect<Acc<T>>& selected, const Acc<T>* threshold,
                 bool per_latent, const Acc<T>* at_least, int64_t most_tokens) {
  using A = Acc<T>;
  const int64_t n = in.x.size(0);
  const BlockPlan plan = plan_blocks(n, most_tokens);
  const int64_t round = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::vector<FoundEntries<A>> found(static_cast<size_t>(round));
  for (int64_t b = 0; b < plan.count; b += round) {
    const A lower_bound =
        per_latent ? A(0) : std::max(selected.lower_bound(), at_least ? *at_least : threshold[0]);
    const int64_t blocks = std::min(round, plan.count - b);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      EncodeBlock<T, W> block(in);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = (b + i) * plan.size;
        found[i] = scan_block(block, first, std::min(plan.size, n - first),
                              per_latent ? threshold : &lower_bound, per_latent);
      }
    });
    for (int64_t i = 0; i < blocks; ++i) selected.append((b + i) * plan.size, found[i]);
  }
}

// A lower bound judged by all latents of a few tokens.
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
  return selected.bound_from_sample(sample, size, n * m);
}

// The largest entries of all. A bound that turns out to leave too few is dropped, and the next one
// tried: it costs time, the result is the same. First comes the caller's guess, then a sample.
template <class T, class W>
void largest_in_blocks(const EncoderInput& in, MatrixSelect<Acc<T>>& selected,
                       const Acc<T>* threshold) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Acc<T> lower_bound =
        attempt == 0 ? selected.threshold_guess() : sampled_bound<T, W>(in, selected);
    if (!(lower_bound > threshold[0])) continue;
    scan_blocks<T, W>(in, selected, threshold, false, &lower_bound, kBlockTokens);
    if (selected.full()) return;
    selected.clear();
  }
  scan_blocks<T, W>(in, selected, threshold, false, nullptr, 64);
}

// The `capacity` largest entries above the threshold. few: what is above it is expected to fit.
template <class T, class W>
Selection encode_select(const EncoderInput& in, int64_t capacity, const Acc<T>* threshold,
                        bool per_column, bool few, const Acc<T>* threshold_guess) {
  using A = Acc<T>;
  const int64_t n = in.x.size(0);
  Selection out(in.x, n, capacity, in.x.scalar_type(), scalar_type_of<A>());
  MatrixSelect<A> selected(n, in.latent_count(), capacity, threshold, per_column);
  if (threshold_guess) selected.guess_threshold(*threshold_guess);
  if (capacity == 0) {
    // Nothing can be kept.
  } else if (encodes_in_blocks(in)) {
    if (few) scan_blocks<T, W>(in, selected, threshold, per_column, nullptr, kBlockTokens);
    else largest_in_blocks<T, W>(in, selected, threshold);
  } else {
    for_each_chunk<T>(in, [&](const T* pre, const A* bias, int64_t first, int64_t rows) {
      selected.add(pre, bias, first, rows);
    });
  }
  int32_t* indices = mutable_data_of<int32_t>(out.indices);
  int32_t* offsets = mutable_data_of<int32_t>(out.offsets);
  *mutable_data_of<A>(out.threshold) =
      selected.finish(mutable_data_of<T>(out.values), indices, offsets, capacity);
  if (in.masked) {
    for (int32_t j = 0; j < offsets[n]; ++j) indices[j] = in.latents[indices[j]];
  }
  return out;
}

}  // namespace fastsae::cpu
