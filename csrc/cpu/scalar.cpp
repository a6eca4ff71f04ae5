// The kernels at one instruction-set level; this file alone has its compiler flags.
#include "cpu/vec_scalar.h"

#include "cpu/filter_impl.h"
#include "cpu/gather_impl.h"

namespace fastsae::cpu::scalar {
namespace {

template <class V, class T>
constexpr Kernels<T> kTable{group_max<V, T>, filter<V, T>, gather_sum<V, T>, gather_dot<V, T>};

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

}  // namespace fastsae::cpu::scalar
