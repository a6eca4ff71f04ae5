// The encoder for a block of tokens: a matmul of its own, whose results are filtered while they
// are in registers. Nothing of size [tokens, d_sae] exists.
//
// A thread owns a block of tokens. It packs them once (they stay in its caches), then reads W_enc a
// tile of some rows at a time, converts the tile to words, and multiplies it with every panel of
// its tokens. W_enc is read from memory once per block, which a block of 512 tokens makes cheap.
// Each pre-activation is one sum over d ascending, so it depends neither on the threads nor on the
// batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/aligned_buffer.h"
#include "cpu/encoder_input.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace fastsae::cpu {

constexpr int64_t kBlockTokens = 512;

// W: the word of the matmul: Acc<T>, or bf16x2 if T is float or bf16.
template <class T, class W>
class EncodeBlock {
 public:
  using A = Acc<T>;

  EncodeBlock(const EncoderInput& in)
      : in_(in),
        d_(in.x.size(1)),
        m_(in.latent_count()),
        depth_(std::is_same_v<W, bf16x2> ? (d_ + 1) / 2 : d_),
        stride_((depth_ + 15) / 16 * 16 + 16),  // not a power of two: rows share no cache set
        W_(data_of<T>(in.W_enc)),
        b_enc_(in.b_enc ? data_of<A>(*in.b_enc) : nullptr) {}

  // Packs `count` tokens, the row of token t being row(t); those that fill up the last panel are 0.
  template <class Row>
  void pack(int64_t count, Row&& row) {
    count_ = count;
    panels_ = (count + tile_.tokens - 1) / tile_.tokens;
    W* x = x_.reserve(panels_ * tile_.tokens * depth_);
    W* words = row_.reserve(stride_);
    A* numbers = numbers_.reserve(d_);
    const T* b_dec = in_.b_dec ? data_of<T>(*in_.b_dec) : nullptr;
    for (int64_t t = 0; t < panels_ * tile_.tokens; ++t) {
      W* to = x + t / tile_.tokens * tile_.tokens * depth_ + t % tile_.tokens;
      if (t < count) {
        kernel_.widen_row(data_of<T>(in_.x) + row(t) * d_, d_, numbers);
        if (b_dec) {
          for (int64_t c = 0; c < d_; ++c) numbers[c] -= widen(b_dec[c]);
        }
        to_words(numbers, words);
      } else {
        std::memset(static_cast<void*>(words), 0, sizeof(W) * static_cast<size_t>(depth_));
      }
      for (int64_t p = 0; p < depth_; ++p) to[p * tile_.tokens] = words[p];
    }
  }

  // out[(f - first) * padded() + t] = pre-activation of latent f and token t, f from `first` to
  // `last` rounded up to a whole tile; -inf for latents that do not exist.
  void store(int64_t first, int64_t last, A* out) {
    for (int64_t f = first; f < last; f += tile_.latents) {
      read_tile(f);
      for (int64_t p = 0; p < panels_; ++p) {
        tile_.store(w_, stride_, panel(p), depth_, bias_,
                    out + (f - first) * padded() + p * tile_.tokens, padded());
      }
    }
  }

  // Calls emit(value, latent, token) for every pre-activation from latent `first` (a multiple of
  // tile()) on that passes: lower_bound[token], or lower_bound[latent] if per_latent. Latents
  // ascend for each token; emit may raise lower_bound[token].
  template <class Emit>
  void filter(int64_t first, const A* lower_bound, bool per_latent, Pass pass, Emit&& emit) {
    const int64_t capacity = tile_.latents * tile_.tokens + 64;
    A* values = values_.reserve(capacity);
    int32_t* codes = codes_.reserve(capacity);
    std::vector<A> bounds(static_cast<size_t>(tile_.latents), std::numeric_limits<A>::infinity());
    for (int64_t f = first; f < m_; f += tile_.latents) {
      read_tile(f);
      if (per_latent)
        std::copy(lower_bound + f, lower_bound + std::min(m_, f + tile_.latents), bounds.begin());
      for (int64_t p = 0; p < panels_; ++p) {
        const int64_t found =
            tile_.filter(w_, stride_, panel(p), depth_, bias_,
                         per_latent ? bounds.data() : lower_bound + p * tile_.tokens, per_latent,
                         pass, values, codes);
        for (int64_t j = 0; j < found; ++j) {
          const int64_t latent = f + codes[j] / tile_.tokens;
          const int64_t token = p * tile_.tokens + codes[j] % tile_.tokens;
          if (latent < m_ && token < count_) emit(values[j], static_cast<int32_t>(latent), token);
        }
      }
    }
  }

  int64_t count() const { return count_; }
  int64_t padded() const { return panels_ * tile_.tokens; }
  int64_t tile() const { return tile_.latents; }

 private:
  const W* panel(int64_t p) { return x_.data() + p * tile_.tokens * depth_; }

  void to_words(const A* numbers, W* words) {
    if constexpr (std::is_same_v<W, bf16x2>) round_row(numbers, d_, words);
    else std::memcpy(words, numbers, sizeof(A) * static_cast<size_t>(d_));
  }

  // Converts latents [f, f + tile()) to words; those past the end get weights 0 and bias -inf.
  void read_tile(int64_t f) {
    w_ = tile_words_.reserve(tile_.latents * stride_);
    bias_ = bias_values_.reserve(tile_.latents);
    for (int64_t l = 0; l < tile_.latents; ++l) {
      W* to = w_ + l * stride_;
      if (f + l >= m_) {
        std::memset(static_cast<void*>(to), 0, sizeof(W) * static_cast<size_t>(depth_));
        bias_[l] = -std::numeric_limits<A>::infinity();
        continue;
      }
      const int64_t latent = in_.masked ? in_.latents[static_cast<size_t>(f + l)] : f + l;
      const T* from = W_ + latent * d_;
      if constexpr (std::is_same_v<W, bf16x2> && std::is_same_v<T, bf16>) {
        to[depth_ - 1] = {0};
        std::memcpy(static_cast<void*>(to), from, sizeof(T) * static_cast<size_t>(d_));
      } else if constexpr (std::is_same_v<W, bf16x2> && std::is_same_v<T, float>) {
        round_row(from, d_, to);
      } else {
        kernel_.widen_row(from, d_, to);
      }
      bias_[l] = b_enc_ ? b_enc_[latent] : A(0);
    }
  }

  const EncoderInput& in_;
  const Kernels<T>& kernel_ = kernels<T>();
  const TileKernels<W>& tile_ = tile_kernels<W>();
  const int64_t d_, m_, depth_, stride_;
  const T* W_;
  const A* b_enc_;
  int64_t count_ = 0, panels_ = 0;
  AlignedBuffer<W> x_, row_, tile_words_;
  AlignedBuffer<A> numbers_, bias_values_, values_;
  AlignedBuffer<int32_t> codes_;
  W* w_ = nullptr;
  A* bias_ = nullptr;
};

// How the rows of x are split among threads: `count` blocks of `size` rows, the last one smaller.
struct BlockPlan {
  int64_t count, size;
};

inline BlockPlan plan_blocks(int64_t n, int64_t most_rows) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t blocks = ((n + most_rows - 1) / most_rows + threads - 1) / threads * threads;
  const int64_t size = ((n + blocks - 1) / blocks + 31) / 32 * 32;
  return {(n + size - 1) / size, size};
}

// Whether the matmul above beats the library's GEMM followed by a selection, which splits few rows
// better among threads. Measured at d 768 with 24,576 latents and at d 576 with 2,304 (2 cores of
// Zen 5): level at 24 rows, 1.1 and 1.4 times as fast at 32, 1.7 and 2 at 48. It always selects on
// unrounded sums, so 16-bit inputs have no other way.
inline bool encodes_in_blocks(const EncoderInput& in) {
  const bool narrow =
      in.x.scalar_type() == ScalarType::BFloat16 || in.x.scalar_type() == ScalarType::Half;
  if (narrow || in.bf16_product) return true;
  return isa() != Isa::kScalar && in.x.size(0) >= 32;
}

// Calls f(Type<T>{}, Type<W>{}) with the storage type of x and the word of the matmul.
template <class F>
auto dispatch_product(const char* op, const EncoderInput& in, F&& f) {
  return dispatch_floating(op, "x", in.x, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
      const bool pairs = in.bf16_product || std::is_same_v<T, bf16>;
      if (pairs && has_bf16_tile()) return f(type, Type<bf16x2>{});
    }
    return f(type, Type<Acc<T>>{});
  });
}

}  // namespace fastsae::cpu
