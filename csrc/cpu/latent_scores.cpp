// scores [F] of the columns of relu(z), z = (x - b_dec) W_enc^T + b_enc, and the `budget`-th
// largest positive entry of z, without that matrix.
//
// A thread owns latents and meets all tokens, a block at a time: their sums are in one order.
#include <cmath>

#include "cpu/encode_block.h"

namespace fastsae::cpu {
namespace {

// The `budget` largest positive numbers of those met.
template <class A>
class LargestValues {
 public:
  explicit LargestValues(int64_t budget) : budget_(budget) {}

  void add(const A* x, int64_t n) {
    if (budget_ == 0) return;
    const size_t needed = static_cast<size_t>(count_ + n + 64);
    if (values_.size() < needed) values_.resize(2 * needed);
    latents_.resize(std::max(latents_.size(), static_cast<size_t>(n + 64)));
    count_ += kernel_.filter(x, static_cast<const A*>(nullptr), n, &lower_bound_, false,
                             Pass::kAbove, 0, values_.data() + count_, latents_.data());
    if (count_ > 2 * budget_ + 4096) keep_largest();
  }

  // Drops all but the `budget` largest. Of later ones only those above the smallest matter.
  void keep_largest() {
    if (count_ <= budget_) return;
    order_.resize(std::max(order_.size(), static_cast<size_t>(count_)));
    lower_bound_ = kernel_.kth_bound(values_.data(), count_, budget_, order_.data());
    int64_t kept = 0;
    for (int64_t j = 0; j < count_; ++j) {
      if (values_[j] > lower_bound_) values_[kept++] = values_[j];
    }
    std::fill(values_.begin() + kept, values_.begin() + std::max(kept, budget_), lower_bound_);
    count_ = std::max(kept, budget_);
  }

  // +inf if there are none.
  A smallest() const {
    A found = std::numeric_limits<A>::infinity();
    for (int64_t j = 0; j < count_; ++j) found = std::min(found, values_[j]);
    return found;
  }

  const A* data() const { return values_.data(); }
  int64_t count() const { return count_; }

 private:
  const Kernels<A>& kernel_ = kernels<A>();
  const int64_t budget_;
  int64_t count_ = 0;
  A lower_bound_ = 0;
  std::vector<A> values_;
  std::vector<int32_t> latents_;
  std::vector<typename Kernels<A>::Key> order_;
};

// Sums over the tokens, of one latent.
struct Sums {
  double first = 0, second = 0;

  // From the row x [n] of pre-activations.
  template <class A>
  void add(const LatentKernels<A>& kernel, const A* x, int64_t n, bool entropy) {
    first += kernel.sum_positive(x, n, !entropy);
    if (entropy) second += kernel.sum_log(x, n);
  }

  // The norm, or -sum p log p = log S - (sum a log a) / S, with S the sum; -inf where that is 0.
  double score(bool entropy) const {
    if (!entropy) return std::sqrt(first);
    return first > 0 ? std::log(first) - second / first : -std::numeric_limits<double>::infinity();
  }
};

template <class T, class W>
void score_latents(const EncoderInput& in, bool entropy, int64_t budget, Acc<T>* scores,
                   Acc<T>* threshold) {
  using A = Acc<T>;
  const LatentKernels<A>& kernel = latent_kernels<A>();
  const int64_t n = in.x.size(0), m = in.d_sae, tile = tile_kernels<W>().latents;
  const int64_t tiles = (m + tile - 1) / tile;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::vector<std::vector<A>> largest(static_cast<size_t>(tiles));  // at the first tile of a thread
  torch::stable::parallel_for(0, tiles, (tiles + threads - 1) / threads,
                              [&](int64_t begin, int64_t end) {
                                const int64_t first = begin * tile, last = std::min(m, end * tile);
                                EncodeBlock<T, W> block(in);
                                AlignedBuffer<A> space;
                                std::vector<Sums> sums(static_cast<size_t>(last - first));
                                LargestValues<A> found(budget);
                                for (int64_t start = 0; start < n; start += kBlockTokens) {
                                  const int64_t count = std::min(kBlockTokens, n - start);
                                  block.pack(count, [&](int64_t t) { return start + t; });
                                  const int64_t padded = block.padded();
                                  A* pre = space.reserve(tile * padded);
                                  for (int64_t f = first; f < last; f += tile) {
                                    block.store(f, f + 1, pre);
                                    for (int64_t l = f; l < std::min(last, f + tile); ++l) {
                                      const A* row = pre + (l - f) * padded;
                                      sums[l - first].add(kernel, row, count, entropy);
                                      found.add(row, count);
                                    }
                                  }
                                }
                                for (int64_t f = first; f < last; ++f) {
                                  scores[f] = static_cast<A>(sums[f - first].score(entropy));
                                }
                                found.keep_largest();
                                largest[begin].assign(found.data(), found.data() + found.count());
                              });
  LargestValues<A> all(budget);
  for (const std::vector<A>& part : largest) {
    all.add(part.data(), static_cast<int64_t>(part.size()));
  }
  all.keep_largest();
  *threshold = all.smallest();
}

std::tuple<Tensor, Tensor> latent_scores(const Tensor& x, const Tensor& W_enc,
                                         std::optional<Tensor> b_enc, std::optional<Tensor> b_dec,
                                         bool entropy, int64_t budget, bool bf16_product) {
  constexpr const char* op = "latent_scores";
  const EncoderInput in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt, bf16_product);
  const int64_t most = selection_capacity(op, "budget", budget, x.size(0), in.d_sae);
  Tensor scores = new_empty(x, {in.d_sae}, accumulator_type(x));
  Tensor threshold = new_empty(x, {}, accumulator_type(x));
  dispatch_product(op, in, [&](auto type, auto word) {
    using T = typename decltype(type)::type;
    using W = typename decltype(word)::type;
    score_latents<T, W>(in, entropy, most, mutable_data_of<Acc<T>>(scores),
                        mutable_data_of<Acc<T>>(threshold));
  });
  return {scores, threshold};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("latent_scores", TORCH_BOX(&latent_scores));
}

}  // namespace fastsae::cpu
