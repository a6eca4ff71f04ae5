// values, indices [n, k]: relu(z) where the score relu(z) (1 + beta |e| / mean |e|) is among the k
// largest of a row, with z = (x - b_dec) W_enc^T + b_enc and e = grad W_dec^T.
//
// A score needs the mean of a row of e first. So e is computed for a block of tokens and kept; then
// z, a tile of latents at a time, which meets its e while it is in a cache.
#include <cmath>

#include "cpu/block_topk.h"
#include "cpu/encode_block.h"

namespace fastsae::cpu {
namespace {

// What is kept of e at a time, per thread; but at least of so many tokens, because W_enc and W_dec
// are read again for every block.
constexpr int64_t kEffectBytes = int64_t{20} << 20;
constexpr int64_t kMinTokens = 64;

template <class T, class W>
void select_by_score(const EncoderInput& in, const EncoderInput& effects, int64_t k, double beta,
                     bool normalize, T* values, int32_t* indices) {
  using A = Acc<T>;
  const LatentKernels<A>& kernel = latent_kernels<A>();
  const int64_t n = in.x.size(0), m = in.d_sae;
  const int64_t block_tokens = std::clamp<int64_t>(
      kEffectBytes / (m * static_cast<int64_t>(sizeof(A))) / 32 * 32, kMinTokens, kBlockTokens);
  const BlockPlan plan = plan_blocks(n, block_tokens);
  torch::stable::parallel_for(0, plan.count, 1, [&](int64_t begin, int64_t end) {
    EncodeBlock<T, W> block(in), other(effects);
    BlockTopK<A> top(k, m, true);
    AlignedBuffer<A> effect_space, base_space, pre_space, score_space;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = b * plan.size, count = std::min(plan.size, n - start);
      const auto token = [&](int64_t t) { return start + t; };
      block.pack(count, token);
      other.pack(count, token);
      const int64_t padded = block.padded(), tile = block.tile();
      A* effect = effect_space.reserve((m + tile) * padded);
      A* base = base_space.reserve(padded);
      std::fill_n(base, padded, A(0));
      for (int64_t f = 0; f < m; f += tile) {
        other.store(f, f + 1, effect + f * padded);
        kernel.add_magnitudes(effect + f * padded, std::min(tile, m - f), padded, padded, base);
      }
      // The score over a number that is the same for all latents of a token: relu(z) (base + |e|).
      for (int64_t t = 0; t < padded; ++t) {
        const A mean = normalize ? base[t] / static_cast<A>(m) : A(1);
        base[t] = mean == A(0) ? A(1) : mean / static_cast<A>(beta);
      }
      top.reset(count, padded);
      const int64_t seeds = top.seeds(), seed_tiles = (seeds + tile - 1) / tile;
      A* pre = pre_space.reserve(seed_tiles * tile * padded);
      A* score = score_space.reserve(seeds * padded);
      block.store(0, seeds, pre);
      for (int64_t f = 0; f < seeds; ++f) {
        const int64_t row = f * padded;
        kernel.score(pre + row, effect + row, base, padded, score + row);
      }
      top.seed(score, pre, padded);
      for (int64_t first = seeds / tile * tile; first < m; first += tile) {
        block.store(first, first + 1, pre);
        for (int64_t f = std::max(first, seeds); f < std::min(m, first + tile); ++f) {
          const A* z = pre + (f - first) * padded;
          kernel.score(z, effect + f * padded, base, padded, score);
          top.add_row(score, z, static_cast<int32_t>(f));
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        const A* value;
        const int32_t* latent;
        top.finish(t, &value, &latent);
        for (int64_t j = 0; j < k; ++j) {
          values[(start + t) * k + j] = narrow<T>(value[j] <= A(0) ? A(0) : value[j]);
          indices[(start + t) * k + j] = latent[j];
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> encode_gradient_topk(const Tensor& x, const Tensor& W_enc,
                                                std::optional<Tensor> b_enc,
                                                std::optional<Tensor> b_dec, const Tensor& grad,
                                                const Tensor& W_dec, int64_t k, double beta,
                                                bool normalize, bool bf16_product) {
  constexpr const char* op = "encode_gradient_topk";
  const EncoderInput in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt, bf16_product);
  check_k(op, k, in.d_sae);
  check_effects(op, x, in.d_sae, grad, W_dec, beta);
  const EncoderInput effects =
      encoder_input(op, grad, W_dec, std::nullopt, std::nullopt, std::nullopt, bf16_product);
  const int64_t n = in.x.size(0);
  Tensor values = new_empty(x, {n, k}, x.scalar_type());
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  if (n == 0) return {values, indices};
  dispatch_product(op, in, [&](auto type, auto word) {
    using T = typename decltype(type)::type;
    using W = typename decltype(word)::type;
    select_by_score<T, W>(in, effects, k, beta, normalize, mutable_data_of<T>(values),
                          mutable_data_of<int32_t>(indices));
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("encode_gradient_topk", TORCH_BOX(&encode_gradient_topk));
}

}  // namespace fastsae::cpu
