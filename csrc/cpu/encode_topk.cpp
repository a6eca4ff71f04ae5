// values, indices [n, k] = topk of (x - b_dec) W_enc^T + b_enc, without that matrix.
//
// In blocks of tokens, see block_topk.h: but for those of the first latents, a pre-activation
// leaves the registers only if it passes the bound of its token.
#include "cpu/block_topk.h"
#include "cpu/encode_block.h"
#include "cpu/row_select.h"

namespace fastsae::cpu {
namespace {

template <class A>
A rectified(A v, bool relu) {
  return relu && v <= A(0) ? A(0) : v;
}

// Rows where only m < k latents may be selected: all of them, and enough of the lowest others with
// value 0, in ascending order. Returns the k latents; from[j] is the position of latent j in the
// compacted pre-activations, -1 for a filler.
std::vector<int32_t> pad_latents(const std::vector<int32_t>& latents, int64_t k,
                                 std::vector<int32_t>& from) {
  std::vector<int32_t> all;
  size_t next = 0;
  int64_t fillers = k - static_cast<int64_t>(latents.size());
  for (int32_t f = 0; static_cast<int64_t>(all.size()) < k; ++f) {
    if (next < latents.size() && latents[next] == f) {
      from.push_back(static_cast<int32_t>(next++));
      all.push_back(f);
    } else if (fillers > 0) {
      --fillers;
      from.push_back(-1);
      all.push_back(f);
    }
  }
  return all;
}

// What is asked for.
struct Choice {
  int64_t k;
  bool relu;      // selected negative values become 0
  bool absolute;  // by magnitude
};

template <class T>
void select_all(const EncoderInput& in, const Choice& choice, T* values, int32_t* indices) {
  using A = Acc<T>;
  const int64_t k = choice.k;
  std::vector<int32_t> from;
  const std::vector<int32_t> all = pad_latents(in.latents, k, from);
  const auto fill = [&](const T* pre, const A* bias, int64_t first, int64_t rows) {
    const int64_t m = in.latent_count();
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < k; ++j) {
        A v = 0;
        if (pre && from[j] >= 0) {
          v = widen(pre[r * m + from[j]]);
          if (bias) v += bias[from[j]];
        }
        values[(first + r) * k + j] = narrow<T>(rectified(v, choice.relu));
        indices[(first + r) * k + j] = all[j];
      }
    }
  };
  if (in.latents.empty()) fill(nullptr, nullptr, 0, in.x.size(0));
  else for_each_chunk<T>(in, fill);
}

template <class T>
void select_chunked(const EncoderInput& in, const Choice& choice, T* values, int32_t* indices) {
  using A = Acc<T>;
  const int64_t m = in.latent_count(), k = choice.k;
  for_each_chunk<T>(in, [&](const T* pre, const A* bias, int64_t first, int64_t rows) {
    const int64_t grain = std::max<int64_t>(1, 16384 / m);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      thread_local RowScratch<A> s;
      thread_local std::vector<A> magnitudes;
      for (int64_t r = begin; r < end; ++r) {
        const T* row = pre + r * m;
        const auto sum = [&](int64_t j) { return bias ? widen(row[j]) + bias[j] : widen(row[j]); };
        if (choice.absolute) {
          magnitudes.resize(static_cast<size_t>(m));
          for (int64_t j = 0; j < m; ++j) magnitudes[j] = std::abs(sum(j));
          select_row(kernels<A>(), magnitudes.data(), static_cast<const A*>(nullptr), m, k, s);
        } else {
          select_row(kernels<T>(), row, bias, m, k, s);
        }
        T* v = values + (first + r) * k;
        int32_t* index = indices + (first + r) * k;
        for (int64_t j = 0; j < k; ++j) {
          const A value = choice.absolute ? sum(s.indices[j]) : s.values[j];
          v[j] = narrow<T>(rectified(value, choice.relu));
          index[j] = in.masked ? in.latents[s.indices[j]] : s.indices[j];
        }
      }
    });
  });
}

template <class T, class W>
void select_in_blocks(const EncoderInput& in, const Choice& choice, T* values, int32_t* indices) {
  using A = Acc<T>;
  const int64_t n = in.x.size(0), k = choice.k;
  const bool absolute = choice.absolute;
  const int64_t seeds = BlockTopK<A>(k, in.latent_count(), absolute).seeds();
  const int64_t block_tokens = std::clamp<int64_t>(
      kSeedBytes / (seeds * static_cast<int64_t>(sizeof(A))) / 32 * 32, 32, kBlockTokens);
  const BlockPlan plan = plan_blocks(n, block_tokens);
  torch::stable::parallel_for(0, plan.count, 1, [&](int64_t begin, int64_t end) {
    EncodeBlock<T, W> block(in);
    BlockTopK<A> top(k, in.latent_count(), absolute);
    AlignedBuffer<A> pre, magnitudes;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = b * plan.size;
      block.pack(std::min(plan.size, n - start), [&](int64_t t) { return start + t; });
      top.reset(block.count(), block.padded());
      const int64_t tiles = (top.seeds() + block.tile() - 1) / block.tile();
      A* first = pre.reserve(tiles * block.tile() * block.padded());
      block.store(0, top.seeds(), first);
      if (absolute) {
        const int64_t size = top.seeds() * block.padded();
        A* keys = magnitudes.reserve(size);
        for (int64_t i = 0; i < size; ++i) keys[i] = std::abs(first[i]);
        top.seed(keys, first, block.padded());
      } else {
        top.seed(first, nullptr, block.padded());
      }
      // The tile that the seeds end in is computed again, from its start: what they have is
      // skipped.
      const int64_t next = top.seeds() / block.tile() * block.tile();
      block.filter(next, top.lower_bounds(), false, absolute ? Pass::kMagnitude : Pass::kNotBelow,
                   [&](A value, int32_t latent, int64_t token) {
                     if (latent < top.seeds()) return;
                     top.add(absolute ? std::abs(value) : value, value, latent, token);
                   });
      for (int64_t t = 0; t < block.count(); ++t) {
        const A* value;
        const int32_t* latent;
        top.finish(t, &value, &latent);
        for (int64_t j = 0; j < k; ++j) {
          values[(start + t) * k + j] = narrow<T>(rectified(value[j], choice.relu));
          indices[(start + t) * k + j] = in.masked ? in.latents[latent[j]] : latent[j];
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> encode_topk(const Tensor& x, const Tensor& W_enc,
                                       std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
                                       int64_t k, std::optional<Tensor> mask, bool relu,
                                       bool absolute, bool bf16_product) {
  const EncoderInput in = encoder_input("encode_topk", x, W_enc, b_enc, b_dec, mask, bf16_product);
  check_k("encode_topk", k, in.d_sae);
  const int64_t n = in.x.size(0);
  Tensor values = new_empty(x, {n, k}, x.scalar_type());
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  if (n == 0) return {values, indices};
  dispatch_product("encode_topk", in, [&](auto type, auto word) {
    using T = typename decltype(type)::type;
    using W = typename decltype(word)::type;
    const bool all = in.latent_count() < k;
    (all                     ? select_all<T>
     : encodes_in_blocks(in) ? select_in_blocks<T, W>
                             : select_chunked<T>)(in, Choice{k, relu, absolute},
                                                  mutable_data_of<T>(values),
                                                  mutable_data_of<int32_t>(indices));
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("encode_topk", TORCH_BOX(&encode_topk));
}

}  // namespace fastsae::cpu
