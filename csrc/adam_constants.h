// Constants of one Adam step, in the type that parameters have. No torch, no CUDA, no standard
// library: files with flags of their own include it.
#pragma once

namespace fastsae {

template <class A>
struct AdamConstants {
  A one_minus_beta1, beta2, one_minus_beta2;
  A step_size;            // lr / (1 - beta1^t)
  A inverse_correction2;  // 1 / sqrt(1 - beta2^t)
  A eps;

  template <class B>
  AdamConstants<B> to() const {
    return {static_cast<B>(one_minus_beta1),     static_cast<B>(beta2),
            static_cast<B>(one_minus_beta2),     static_cast<B>(step_size),
            static_cast<B>(inverse_correction2), static_cast<B>(eps)};
  }
};

}  // namespace fastsae
