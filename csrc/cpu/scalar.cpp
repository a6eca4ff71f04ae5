// The kernels at one instruction-set level; this file alone has its compiler flags.
#include "cpu/vec_scalar.h"

#include "cpu/adam_impl.h"
#include "cpu/filter_impl.h"
#include "cpu/gather_impl.h"
#include "cpu/select_impl.h"
#include "cpu/tile_impl.h"

namespace fastsae::cpu::scalar {
namespace {

template <class V, class T>
constexpr Kernels<T> kTable{group_max<V, T>,  filter<V, T>,    keep_largest<V>,  kth_bound<V>,
                            gather_sum<V, T>, widen_row<V, T>, gather_dot<V, T>, widen_max<V, T>};

}  // namespace

template <>
const Kernels<float>& table() {
  return kTable<VecF, float>;
}
template <>
const Kernels<double>& table() {
  return kTable<VecD, double>;
}
template <>
const Kernels<bf16>& table() {
  return kTable<VecF, bf16>;
}
template <>
const Kernels<fp16>& table() {
  return kTable<VecF, fp16>;
}

template <>
const TileKernels<float>& tile() {
  return kTileTable<VecF, PlainWords<VecF>>;
}
template <>
const TileKernels<double>& tile() {
  return kTileTable<VecD, PlainWords<VecD>>;
}

template <>
const AdamKernels<float>& adam() {
  return kAdamTable<VecF>;
}
template <>
const AdamKernels<double>& adam() {
  return kAdamTable<VecD>;
}

}  // namespace fastsae::cpu::scalar
