#include "cpu/kernels.h"

#include "cpu/isa.h"

namespace fastsae::cpu {

template <class T>
const Kernels<T>& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return avx512::table<T>();
    case Isa::kAvx2:
      return avx2::table<T>();
#endif
    default:
      return scalar::table<T>();
  }
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<bf16>& kernels<bf16>();
template const Kernels<fp16>& kernels<fp16>();

}  // namespace fastsae::cpu
