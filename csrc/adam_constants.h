// Constants of one Adam step, in the type that parameters have. No torch, no CUDA, no standard
// library: files with flags of their own include it.
#pragma once

#include <stdint.h>

namespace fastsae {

// What stays the same from step to step.
template <class A>
struct AdamSettings {
  A one_minus_beta1, beta2, one_minus_beta2;
  A eps;

  template <class B>
  AdamSettings<B> to() const {
    return {static_cast<B>(one_minus_beta1), static_cast<B>(beta2), static_cast<B>(one_minus_beta2),
            static_cast<B>(eps)};
  }
};

// What changes; adam_rate.h computes it.
template <class A>
struct AdamRate {
  A step_size;            // lr / (1 - beta1^t)
  A inverse_correction2;  // 1 / sqrt(1 - beta2^t); 0: there is no step
  uint64_t dither;        // of averages that are rounded stochastically, see dither.h

  template <class B>
  AdamRate<B> to() const {
    return {static_cast<B>(step_size), static_cast<B>(inverse_correction2), dither};
  }
};

template <class A>
struct AdamConstants : AdamSettings<A>, AdamRate<A> {};

}  // namespace fastsae
