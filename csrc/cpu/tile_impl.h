// A tile of latents times a panel of tokens, kept in registers, then stored or filtered there.
//
// w is row-major: row l of the tile starts at w + l * stride. x is packed: word p of all tokens of
// the panel lies together. One step loads the panel's words, broadcasts one word per latent and
// does kTileLatents * kTileVectors multiply-adds: with 12 * 2 accumulators the two multiply units
// of an AVX-512 core are busy all the time (247 of 250 GFLOP/s in float32 on Zen 5). Every sum runs
// over p ascending in one accumulator, so it does not depend on the tile that it falls into.
#pragma once

#include "cpu/kernels.h"

namespace fastsae::cpu {
namespace {

// How words are loaded and multiplied; `Word` is what `TileKernels` counts in.
template <class V>
struct PlainWords {
  using Word = typename V::A;
  using X = V;
  static X load(const Word* p) { return V::load(p); }
  static X broadcast(const Word* p) { return V::set1(*p); }
  static V multiply_add(X w, X x, V sum) { return V::fma(w, x, sum); }
};

template <class V, class M>
struct Tile {
  using A = typename V::A;
  using Word = typename M::Word;
  static constexpr int kLatents = V::kTileLatents, kVectors = V::kTileVectors;
  static constexpr int kTokens = kVectors * V::kWidth;

  V sum[kLatents][kVectors];

  // word(l, p) is where word p of latent l is.
  template <class At>
  inline __attribute__((always_inline)) void multiply(int64_t depth, const Word* x, At word) {
    for (int l = 0; l < kLatents; ++l) {
      for (int v = 0; v < kVectors; ++v) sum[l][v] = V::set1(A(0));
    }
    for (int64_t p = 0; p < depth; ++p) {
      typename M::X words[kVectors];
      for (int v = 0; v < kVectors; ++v) words[v] = M::load(x + v * V::kWidth);
      x += kTokens;
      for (int l = 0; l < kLatents; ++l) {
        const typename M::X weight = M::broadcast(word(l, p));
        for (int v = 0; v < kVectors; ++v) {
          sum[l][v] = M::multiply_add(weight, words[v], sum[l][v]);
        }
      }
    }
  }

  inline __attribute__((always_inline)) void compute(const Word* w, int64_t stride, const Word* x,
                                                     int64_t depth, const A* bias) {
    const Word* row[kLatents];
    for (int l = 0; l < kLatents; ++l) row[l] = w + l * stride;
    multiply(depth, x, [&row](int l, int64_t p) { return row[l] + p; });
    for (int l = 0; l < kLatents; ++l) {
      for (int v = 0; v < kVectors; ++v) sum[l][v] = sum[l][v] + V::set1(bias[l]);
    }
  }
};

template <class V, class M>
void tile_store(const typename M::Word* w, int64_t stride, const typename M::Word* x, int64_t depth,
                const typename V::A* bias, typename V::A* out, int64_t out_stride) {
  using T = Tile<V, M>;
  T tile;
  tile.compute(w, stride, x, depth, bias);
  for (int l = 0; l < T::kLatents; ++l) {
    for (int v = 0; v < T::kVectors; ++v) {
      tile.sum[l][v].store(out + l * out_stride + v * V::kWidth);
    }
  }
}

// As tile_store without a bias, added to what is there if `add`; word p of all latents lies
// together.
template <class V, class M>
void tile_add(const typename M::Word* w, const typename M::Word* x, int64_t depth, bool add,
              typename V::A* out, int64_t out_stride) {
  using T = Tile<V, M>;
  T tile;
  tile.multiply(depth, x, [w](int l, int64_t p) { return w + p * T::kLatents + l; });
  for (int l = 0; l < T::kLatents; ++l, out += out_stride) {
    for (int v = 0; v < T::kVectors; ++v) {
      typename V::A* to = out + v * V::kWidth;
      (add ? V::load(to) + tile.sum[l][v] : tile.sum[l][v]).store(to);
    }
  }
}

template <class V, class M, bool kPerLatent, Pass kPass>
int64_t tile_filter_loop(const typename M::Word* w, int64_t stride, const typename M::Word* x,
                         int64_t depth, const typename V::A* bias, const typename V::A* lower_bound,
                         typename V::A* values, int32_t* codes) {
  using T = Tile<V, M>;
  T tile;
  tile.compute(w, stride, x, depth, bias);
  int64_t count = 0;
  for (int l = 0; l < T::kLatents; ++l) {
    for (int v = 0; v < T::kVectors; ++v) {
      const V bound = kPerLatent ? V::set1(lower_bound[l]) : V::load(lower_bound + v * V::kWidth);
      const V sum = tile.sum[l][v];
      const unsigned mask = V::bits(
          kPass == Pass::kAbove
              ? V::above(sum, bound)
              : V::not_below_or_equal(kPass == Pass::kMagnitude ? V::abs(sum) : sum, bound));
      if (__builtin_expect(mask == 0, 1)) continue;
      count +=
          V::compress(sum, mask, l * T::kTokens + v * V::kWidth, values + count, codes + count);
    }
  }
  return count;
}

template <class V, class M>
int64_t tile_filter(const typename M::Word* w, int64_t stride, const typename M::Word* x,
                    int64_t depth, const typename V::A* bias, const typename V::A* lower_bound,
                    bool per_latent, Pass pass, typename V::A* values, int32_t* codes) {
  if (per_latent) {
    return tile_filter_loop<V, M, true, Pass::kAbove>(w, stride, x, depth, bias, lower_bound,
                                                      values, codes);
  }
  if (pass == Pass::kAbove) {
    return tile_filter_loop<V, M, false, Pass::kAbove>(w, stride, x, depth, bias, lower_bound,
                                                       values, codes);
  }
  if (pass == Pass::kMagnitude) {
    return tile_filter_loop<V, M, false, Pass::kMagnitude>(w, stride, x, depth, bias, lower_bound,
                                                           values, codes);
  }
  return tile_filter_loop<V, M, false, Pass::kNotBelow>(w, stride, x, depth, bias, lower_bound,
                                                        values, codes);
}

template <class V, class M>
constexpr TileKernels<typename M::Word> kTileTable{V::kTileLatents, V::kTileVectors * V::kWidth,
                                                   tile_store<V, M>, tile_add<V, M>,
                                                   tile_filter<V, M>};

// out[0, n) = x, widened.
template <class V, class T>
void widen_row(const T* x, int64_t n, typename V::A* out) {
  int64_t j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) V::load(x + j).store(out + j);
  for (; j < n; ++j) out[j] = widen(x[j]);
}

}  // namespace
}  // namespace fastsae::cpu
