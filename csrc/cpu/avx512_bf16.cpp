// The encoder's matmul in bfloat16 with float32 sums, by the dot-product instruction of AVX-512
// BF16: two multiply-adds a lane. This file alone has its compiler flags.
#include "cpu/vec_avx512.h"

#include "cpu/tile_impl.h"

namespace fastsae::cpu::avx512_bf16 {
namespace {

struct PairWords {
  using Word = bf16x2;
  using X = __m512i;
  static X load(const Word* p) { return _mm512_loadu_si512(p); }
  static X broadcast(const Word* p) { return _mm512_set1_epi32(static_cast<int>(p->bits)); }
  static VecF multiply_add(X w, X x, VecF sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)w, (__m512bh)x)};
  }
};

}  // namespace

const TileKernels<bf16x2>& tile() {
  return kTileTable<VecF, PairWords>;
}

void round_row(const float* x, int64_t n, bf16x2* out) {
  bf16* to = reinterpret_cast<bf16*>(out);
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + j));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), rounded);
  }
  for (; j < n; ++j) to[j] = narrow<bf16>(x[j]);
  if (n % 2) to[n] = {0};
}

}  // namespace fastsae::cpu::avx512_bf16
