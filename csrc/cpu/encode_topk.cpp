// values, indices [n, k] = topk of (x - b_dec) W_enc^T + b_enc, without that matrix.
//
// In blocks of tokens: the first latents are computed for all tokens of the block and kept; maxima
// of groups of them give each token a lower bound of its k-th largest. From then on a
// pre-activation leaves the registers only if it passes the bound of its token, which rises as
// candidates gather.
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

template <class T>
void select_all(const EncoderInput& in, int64_t k, bool relu, T* values, int32_t* indices) {
  using A = Acc<T>;
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
        values[(first + r) * k + j] = narrow<T>(rectified(v, relu));
        indices[(first + r) * k + j] = all[j];
      }
    }
  };
  if (in.latents.empty()) fill(nullptr, nullptr, 0, in.x.size(0));
  else for_each_chunk<T>(in, fill);
}

template <class T>
void select_chunked(const EncoderInput& in, int64_t k, bool relu, T* values, int32_t* indices) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t m = in.latent_count();
  for_each_chunk<T>(in, [&](const T* pre, const Acc<T>* bias, int64_t first, int64_t rows) {
    const int64_t grain = std::max<int64_t>(1, 16384 / m);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      thread_local RowScratch<Acc<T>> s;
      for (int64_t r = begin; r < end; ++r) {
        select_row(kernel, pre + r * m, bias, m, k, static_cast<const T*>(nullptr), s);
        T* v = values + (first + r) * k;
        int32_t* index = indices + (first + r) * k;
        for (int64_t j = 0; j < k; ++j) {
          v[j] = narrow<T>(rectified(s.values[j], relu));
          index[j] = in.masked ? in.latents[s.indices[j]] : s.indices[j];
        }
      }
    });
  });
}

// The candidates of every token of a block, and its bound.
template <class A>
class BlockTopK {
 public:
  static constexpr int64_t kSeeds = 2048;  // latents that the first bounds come from, at least

  BlockTopK(const Kernels<A>& kernel, int64_t k, int64_t latents)
      : kernel_(kernel),
        k_(k),
        capacity_(std::max<int64_t>(1024, 3 * k)),
        groups_((4 * k + 63) / 64 * 64),
        seeds_(std::min(latents, std::max(kSeeds, 2 * groups_))) {}

  // Latents that `seed` needs.
  int64_t seeds() const { return seeds_; }

  void reset(int64_t tokens, int64_t padded) {
    // Padding never passes.
    lower_bounds_.assign(static_cast<size_t>(padded), std::numeric_limits<A>::infinity());
    std::fill_n(lower_bounds_.begin(), tokens, std::numeric_limits<A>::quiet_NaN());
    counts_.assign(static_cast<size_t>(tokens), 0);
    values_ = value_space_.reserve(tokens * capacity_);
    latents_ = latent_space_.reserve(tokens * capacity_);
    keys_ = key_space_.reserve(std::max(capacity_, groups_));
  }

  A* lower_bounds() { return lower_bounds_.data(); }

  // Sets the bounds from pre[f * padded + t], f < seeds(), and takes the candidates among them.
  void seed(const A* pre, int64_t padded) {
    const int64_t tokens = static_cast<int64_t>(counts_.size());
    if (2 * groups_ <= seeds_) bound(pre, padded);
    A* values = filtered_.reserve(tokens + 64);
    int32_t* at = filtered_at_.reserve(tokens + 64);
    for (int64_t f = 0; f < seeds_; ++f) {
      const int64_t found =
          kernel_.filter(pre + f * padded, static_cast<const A*>(nullptr), tokens,
                         lower_bounds_.data(), true, Pass::kNotBelow, 0, values, at);
      for (int64_t j = 0; j < found; ++j) add(values[j], static_cast<int32_t>(f), at[j]);
    }
  }

  void add(A value, int32_t latent, int64_t token) {
    int64_t& count = counts_[token];
    if (count == capacity_) tighten(token);
    values_[token * capacity_ + count] = value;
    latents_[token * capacity_ + count++] = latent;
  }

  // Leaves the k largest, ascending latent.
  void finish(int64_t token, const A** values, const int32_t** latents) {
    if (counts_[token] > k_) tighten(token);
    *values = values_ + token * capacity_;
    *latents = latents_ + token * capacity_;
  }

 private:
  void tighten(int64_t token) {
    const A least = kernel_.keep_largest(values_ + token * capacity_, latents_ + token * capacity_,
                                         counts_[token], k_, keys_);
    counts_[token] = k_;
    // What comes later and equals the least kept loses to it: strict is right. After k NaNs only a
    // NaN would pass +inf, and lose as well.
    lower_bounds_[token] = std::isnan(least) ? std::numeric_limits<A>::infinity() : least;
  }

  void bound(const A* pre, int64_t padded) {
    constexpr A kInf = std::numeric_limits<A>::infinity();
    A* maxima = maxima_.reserve(groups_ * padded);
    std::fill_n(maxima, groups_ * padded, -kInf);
    for (int64_t f = 0; f < seeds_; ++f) {
      const A* row = pre + f * padded;
      A* best = maxima + f % groups_ * padded;
      for (int64_t t = 0; t < padded; ++t) best[t] = row[t] > best[t] ? row[t] : best[t];
    }
    A* column = column_.reserve(groups_);
    for (size_t t = 0; t < counts_.size(); ++t) {
      for (int64_t g = 0; g < groups_; ++g) column[g] = maxima[g * padded + t];
      const A found = kernel_.kth_bound(column, groups_, k_, keys_);
      // Entries equal to the bound belong: the filter is strict, so it gets the number below.
      if (found > -kInf) lower_bounds_[t] = std::nextafter(found, -kInf);
    }
  }

  const Kernels<A>& kernel_;
  const int64_t k_, capacity_, groups_, seeds_;
  std::vector<A> lower_bounds_;
  std::vector<int64_t> counts_;
  AlignedBuffer<A> value_space_, maxima_, column_, filtered_;
  AlignedBuffer<int32_t> latent_space_, filtered_at_;
  AlignedBuffer<typename Kernels<A>::Key> key_space_;
  A* values_ = nullptr;
  int32_t* latents_ = nullptr;
  typename Kernels<A>::Key* keys_ = nullptr;
};

template <class T, class W>
void select_in_blocks(const EncoderInput& in, int64_t k, bool relu, T* values, int32_t* indices) {
  using A = Acc<T>;
  const int64_t n = in.x.size(0);
  // The kept pre-activations of a block take at most 16 MiB.
  constexpr int64_t kSeedBytes = int64_t{16} << 20;
  const int64_t seeds = BlockTopK<A>(kernels<A>(), k, in.latent_count()).seeds();
  const int64_t block_tokens = std::clamp<int64_t>(
      kSeedBytes / (seeds * static_cast<int64_t>(sizeof(A))) / 32 * 32, 32, kBlockTokens);
  const BlockPlan plan = plan_blocks(n, block_tokens);
  torch::stable::parallel_for(0, plan.count, 1, [&](int64_t begin, int64_t end) {
    EncodeBlock<T, W> block(in);
    BlockTopK<A> top(kernels<A>(), k, in.latent_count());
    AlignedBuffer<A> pre;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = b * plan.size;
      block.pack(std::min(plan.size, n - start), [&](int64_t t) { return start + t; });
      top.reset(block.count(), block.padded());
      const int64_t tiles = (top.seeds() + block.tile() - 1) / block.tile();
      A* first = pre.reserve(tiles * block.tile() * block.padded());
      block.store(0, top.seeds(), first);
      top.seed(first, block.padded());
      // The tile that the seeds end in is computed again, from its start: what they have is
      // skipped.
      const int64_t next = top.seeds() / block.tile() * block.tile();
      block.filter(next, top.lower_bounds(), false, Pass::kNotBelow,
                   [&](A value, int32_t latent, int64_t token) {
                     if (latent >= top.seeds()) top.add(value, latent, token);
                   });
      for (int64_t t = 0; t < block.count(); ++t) {
        const A* value;
        const int32_t* latent;
        top.finish(t, &value, &latent);
        for (int64_t j = 0; j < k; ++j) {
          values[(start + t) * k + j] = narrow<T>(rectified(value[j], relu));
          indices[(start + t) * k + j] = in.masked ? in.latents[latent[j]] : latent[j];
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> encode_topk(const Tensor& x, const Tensor& W_enc,
                                       std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
                                       int64_t k, std::optional<Tensor> mask, bool relu,
                                       bool bf16_product) {
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
                             : select_chunked<T>)(in, k, relu, mutable_data_of<T>(values),
                                                  mutable_data_of<int32_t>(indices));
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("encode_topk", TORCH_BOX(&encode_topk));
}

}  // namespace fastsae::cpu
