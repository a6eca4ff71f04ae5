#include "cpu/kernels.h"

#include "cpu/isa.h"

namespace fastsae::cpu {
namespace {

// f of the current level: of one object for each, since they differ in type.
template <class F>
decltype(auto) at_level(F&& f) {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return f(Level<Isa::kAvx512>{});
    case Isa::kAvx2:
      return f(Level<Isa::kAvx2>{});
#endif
    default:
      return f(Level<Isa::kScalar>{});
  }
}

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  return at_level([](auto level) -> const Kernels<T>& { return level.template table<T>(); });
}
template <class W>
const TileKernels<W>& tile_kernels() {
  return at_level([](auto level) -> const TileKernels<W>& { return level.template tile<W>(); });
}
template <class A>
const LatentKernels<A>& latent_kernels() {
  return at_level(
      [](auto level) -> const LatentKernels<A>& { return level.template latents<A>(); });
}
template <class A>
const AdamKernels<A>& adam_kernels() {
  return at_level([](auto level) -> const AdamKernels<A>& { return level.template adam<A>(); });
}

#if defined(__x86_64__)
bool has_bf16_tile() {
  return isa() == Isa::kAvx512 && has_avx512_bf16();
}
template <>
const TileKernels<bf16x2>& tile_kernels() {
  return avx512_bf16::tile();
}
void round_row(const float* x, int64_t n, bf16x2* out) {
  avx512_bf16::round_row(x, n, out);
}
#else
bool has_bf16_tile() {
  return false;
}
template <>
const TileKernels<bf16x2>& tile_kernels() {
  __builtin_trap();  // has_bf16_tile() says no
}
void round_row(const float*, int64_t, bf16x2*) {
  __builtin_trap();
}
#endif

template const LatentKernels<float>& latent_kernels<float>();
template const LatentKernels<double>& latent_kernels<double>();
template const AdamKernels<float>& adam_kernels<float>();
template const AdamKernels<double>& adam_kernels<double>();
template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<bf16>& kernels<bf16>();
template const Kernels<fp16>& kernels<fp16>();

}  // namespace fastsae::cpu
