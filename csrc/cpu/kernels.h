// The loops that exist once per instruction set, as tables of function pointers.
//
// A table is built by each of scalar.cpp, avx2.cpp and avx512.cpp from the same *_impl.h sources;
// kernels<T>() returns the one for the current ISA. T is the storage type, Acc<T> the type of sums.
#pragma once

#include "cpu/types.h"

namespace fastsae::cpu {

// Which entries a filter lets through, for a threshold tau.
enum class Pass {
  kNotBelow,  // !(x <= tau): above tau, or unordered. A NaN entry passes; a NaN tau passes all.
  kAbove,     // x > tau: a NaN entry never passes.
};

template <class T>
struct Kernels {
  using A = Acc<T>;

  // out[g] = max over j = g (mod groups) of x[j] + bias[j], NaN ignored, -inf for an empty group.
  // bias may be null. groups is a multiple of 64.
  void (*group_max)(const T* x, const A* bias, int64_t n, int64_t groups, A* out);

  // Appends the (value, base + j) of every passing x[j] + bias[j], j ascending; returns how many.
  // tau is one number, or one per column when `per_column`. The outputs have room for n + 64.
  int64_t (*filter)(const T* x, const A* bias, int64_t n, const A* tau, bool per_column, Pass pass,
                    int32_t base, A* values, int32_t* indices);

  // out[d] = bias[d] + sum over j < count of weights[j] rows[indices[j]][d], j ascending.
  // acc [d] is scratch. bias may be null.
  void (*gather_sum)(const A* weights, const int32_t* indices, int64_t count, const T* rows,
                     int64_t d, const T* bias, A* acc, T* out);

  // out[j] = <x, rows[indices[j]]> for j < count.
  void (*gather_dot)(const T* x, const int32_t* indices, int64_t count, const T* rows, int64_t d,
                     A* out);
};

namespace scalar {
template <class T>
const Kernels<T>& table();
}
namespace avx2 {
template <class T>
const Kernels<T>& table();
}
namespace avx512 {
template <class T>
const Kernels<T>& table();
}

template <class T>
const Kernels<T>& kernels();

}  // namespace fastsae::cpu
