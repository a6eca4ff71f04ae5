// The k largest latents of every token of a block, met a latent at a time.
//
// The first latents are computed for all tokens of the block and kept; maxima of groups of them
// give each token a lower bound of its k-th largest. From then on a latent becomes a candidate only
// if it passes the bound of its token, which rises as candidates gather.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/aligned_buffer.h"
#include "cpu/kernels.h"

namespace fastsae::cpu {

// The kept pre-activations of a block take at most this much.
constexpr int64_t kSeedBytes = int64_t{16} << 20;

template <class A>
class BlockTopK {
 public:
  static constexpr int64_t kSeeds = 2048;  // latents that the first bounds come from, at least

  // keyed: what is compared is a key, and every entry has a value besides.
  BlockTopK(int64_t k, int64_t latents, bool keyed)
      : k_(k),
        capacity_(std::max<int64_t>(1024, 3 * k)),
        groups_((4 * k + 63) / 64 * 64),
        seeds_(std::min(latents, std::max(kSeeds, 2 * groups_))),
        keyed_(keyed) {}

  // Latents that `seed` needs.
  int64_t seeds() const { return seeds_; }

  void reset(int64_t tokens, int64_t padded) {
    // Padding never passes.
    lower_bounds_.assign(static_cast<size_t>(padded), std::numeric_limits<A>::infinity());
    std::fill_n(lower_bounds_.begin(), tokens, std::numeric_limits<A>::quiet_NaN());
    counts_.assign(static_cast<size_t>(tokens), 0);
    keys_ = key_space_.reserve(tokens * capacity_);
    latents_ = latent_space_.reserve(tokens * capacity_);
    if (keyed_) {
      values_ = value_space_.reserve(tokens * capacity_);
      slots_ = slot_space_.reserve(capacity_);
    }
    order_ = order_space_.reserve(std::max(capacity_, groups_));
  }

  A* lower_bounds() { return lower_bounds_.data(); }

  // Sets the bounds from keys[f * padded + t], f < seeds(), and takes the candidates among them;
  // `values` alike, or null if they are their own keys.
  void seed(const A* keys, const A* values, int64_t padded) {
    if (2 * groups_ <= seeds_) bound(keys, padded);
    for (int64_t f = 0; f < seeds_; ++f) {
      const int64_t row = f * padded;
      add_row(keys + row, values ? values + row : nullptr, static_cast<int32_t>(f));
    }
  }

  // Takes what passes of one latent of all tokens.
  void add_row(const A* keys, const A* values, int32_t latent) {
    const int64_t tokens = static_cast<int64_t>(counts_.size());
    A* passed = filtered_.reserve(tokens + 64);
    int32_t* at = filtered_at_.reserve(tokens + 64);
    const int64_t found =
        kernel_.filter(keys, static_cast<const A*>(nullptr), tokens, lower_bounds_.data(), true,
                       Pass::kNotBelow, 0, passed, at);
    for (int64_t j = 0; j < found; ++j) {
      add(passed[j], values ? values[at[j]] : passed[j], latent, at[j]);
    }
  }

  void add(A key, A value, int32_t latent, int64_t token) {
    int64_t& count = counts_[token];
    if (count == capacity_) tighten(token);
    const int64_t to = token * capacity_ + count++;
    keys_[to] = key;
    latents_[to] = latent;
    if (keyed_) values_[to] = value;
  }

  // Leaves the k largest, ascending latent.
  void finish(int64_t token, const A** values, const int32_t** latents) {
    if (counts_[token] > k_) tighten(token);
    *values = (keyed_ ? values_ : keys_) + token * capacity_;
    *latents = latents_ + token * capacity_;
  }

 private:
  void tighten(int64_t token) {
    const int64_t first = token * capacity_, count = counts_[token];
    int32_t* moved = latents_ + first;
    if (keyed_) {
      moved = slots_;
      for (int64_t j = 0; j < count; ++j) moved[j] = static_cast<int32_t>(j);
    }
    const A least = kernel_.keep_largest(keys_ + first, moved, count, k_, order_);
    for (int64_t j = 0; keyed_ && j < k_; ++j) {
      latents_[first + j] = latents_[first + moved[j]];
      values_[first + j] = values_[first + moved[j]];
    }
    counts_[token] = k_;
    // What comes later and equals the least kept loses to it: strict is right. After k NaNs only a
    // NaN would pass +inf, and lose as well.
    lower_bounds_[token] = std::isnan(least) ? std::numeric_limits<A>::infinity() : least;
  }

  void bound(const A* keys, int64_t padded) {
    constexpr A kInf = std::numeric_limits<A>::infinity();
    A* maxima = maxima_.reserve(groups_ * padded);
    std::fill_n(maxima, groups_ * padded, -kInf);
    for (int64_t f = 0; f < seeds_; ++f) {
      const A* row = keys + f * padded;
      A* best = maxima + f % groups_ * padded;
      for (int64_t t = 0; t < padded; ++t) best[t] = row[t] > best[t] ? row[t] : best[t];
    }
    A* column = column_.reserve(groups_);
    for (size_t t = 0; t < counts_.size(); ++t) {
      for (int64_t g = 0; g < groups_; ++g) column[g] = maxima[g * padded + t];
      const A found = kernel_.kth_bound(column, groups_, k_, order_);
      // Entries equal to the bound belong: the filter is strict, so it gets the number below.
      if (found > -kInf) lower_bounds_[t] = std::nextafter(found, -kInf);
    }
  }

  const Kernels<A>& kernel_ = kernels<A>();
  const int64_t k_, capacity_, groups_, seeds_;
  const bool keyed_;
  std::vector<A> lower_bounds_;
  std::vector<int64_t> counts_;
  AlignedBuffer<A> key_space_, value_space_, maxima_, column_, filtered_;
  AlignedBuffer<int32_t> latent_space_, slot_space_, filtered_at_;
  AlignedBuffer<typename Kernels<A>::Key> order_space_;
  A* keys_ = nullptr;
  A* values_ = nullptr;
  int32_t* latents_ = nullptr;
  int32_t* slots_ = nullptr;
  typename Kernels<A>::Key* order_ = nullptr;
};

}  // namespace fastsae::cpu
