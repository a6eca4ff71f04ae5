// values, indices [n, k] = the largest of each of k equal groups of latents of
// (x - b_dec) W_enc^T + b_enc, without that matrix.
//
// A thread owns a block of tokens; a tile of latents of all of them is compared with what their
// group has so far while it is in a cache.
#include <cmath>

#include "cpu/encode_block.h"

namespace fastsae::cpu {
namespace {

template <class A>
A rectified(A v) {
  return v <= A(0) ? A(0) : v;
}

// For few rows, by the library's GEMM.
template <class T>
void largest_chunked(const EncoderInput& in, int64_t k, T* values, int32_t* indices) {
  using A = Acc<T>;
  const int64_t m = in.d_sae, size = m / k;
  for_each_chunk<T>(in, [&](const T* pre, const A* bias, int64_t first, int64_t rows) {
    torch::stable::parallel_for(
        0, rows, std::max<int64_t>(1, 16384 / m), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            const auto at = [&](int64_t j) {
              return bias ? widen(pre[r * m + j]) + bias[j] : widen(pre[r * m + j]);
            };
            for (int64_t g = 0; g < k; ++g) {
              A best = at(g * size);
              int64_t which = g * size;
              for (int64_t j = which + 1; j < (g + 1) * size; ++j) {
                const A v = at(j);
                if (!(v > best) && !(std::isnan(v) && !std::isnan(best))) continue;
                best = v;
                which = j;
              }
              values[(first + r) * k + g] = narrow<T>(rectified(best));
              indices[(first + r) * k + g] = static_cast<int32_t>(which);
            }
          }
        });
  });
}

template <class T, class W>
void largest_in_blocks(const EncoderInput& in, int64_t k, T* values, int32_t* indices) {
  using A = Acc<T>;
  const LatentKernels<A>& kernel = latent_kernels<A>();
  const int64_t n = in.x.size(0), m = in.d_sae, size = m / k;
  const BlockPlan plan = plan_blocks(n, kBlockTokens);
  torch::stable::parallel_for(0, plan.count, 1, [&](int64_t begin, int64_t end) {
    EncodeBlock<T, W> block(in);
    AlignedBuffer<A> pre_space, best_space;
    AlignedBuffer<int32_t> at_space;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = b * plan.size;
      block.pack(std::min(plan.size, n - start), [&](int64_t t) { return start + t; });
      const int64_t padded = block.padded(), tile = block.tile();
      A* pre = pre_space.reserve(tile * padded);
      A* best = best_space.reserve(padded);
      int32_t* at = at_space.reserve(padded);
      for (int64_t first = 0; first < m; first += tile) {
        block.store(first, first + 1, pre);
        // The rows of the tile that are of one group, a group at a time.
        int64_t f = first;
        const int64_t last = std::min(m, first + tile);
        while (f < last) {
          const int64_t group_end = f / size * size + size, stop = std::min(last, group_end);
          const A* row = pre + (f - first) * padded;
          int64_t rows = stop - f, from = f;
          if (f % size == 0) {
            std::memcpy(best, row, sizeof(A) * static_cast<size_t>(padded));
            std::fill_n(at, padded, static_cast<int32_t>(f));
            row += padded;
            --rows;
            ++from;
          }
          kernel.max_rows(row, rows, padded, padded, static_cast<int32_t>(from), best, at);
          if (stop == group_end) {
            const int64_t g = f / size;
            for (int64_t t = 0; t < block.count(); ++t) {
              values[(start + t) * k + g] = narrow<T>(rectified(best[t]));
              indices[(start + t) * k + g] = at[t];
            }
          }
          f = stop;
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> encode_group_max(const Tensor& x, const Tensor& W_enc,
                                            std::optional<Tensor> b_enc,
                                            std::optional<Tensor> b_dec, int64_t k,
                                            bool bf16_product) {
  constexpr const char* op = "encode_group_max";
  const EncoderInput in = encoder_input(op, x, W_enc, b_enc, b_dec, std::nullopt, bf16_product);
  check_groups(op, k, in.d_sae);
  const int64_t n = in.x.size(0);
  Tensor values = new_empty(x, {n, k}, x.scalar_type());
  Tensor indices = new_empty(x, {n, k}, ScalarType::Int);
  if (n == 0) return {values, indices};
  dispatch_product(op, in, [&](auto type, auto word) {
    using T = typename decltype(type)::type;
    using W = typename decltype(word)::type;
    (encodes_in_blocks(in) ? largest_in_blocks<T, W>
                           : largest_chunked<T>)(in, k, mutable_data_of<T>(values),
                                                 mutable_data_of<int32_t>(indices));
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("encode_group_max", TORCH_BOX(&encode_group_max));
}

}  // namespace fastsae::cpu
