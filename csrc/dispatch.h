// From a torch dtype at run time to a C++ type.
#pragma once

#include "check.h"
#include "types.h"

namespace fastsae {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the storage type of `t`.
template <class F>
auto dispatch_floating(const char* op, const char* name, const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::BFloat16:
      return f(Type<bf16>{});
    case ScalarType::Half:
      return f(Type<fp16>{});
    default:
      FASTSAE_CHECK(false, op, ": expected ", name, " to be float32, float64, bfloat16 or float16");
  }
}

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, fp16>) return ScalarType::Half;
}

// The dtype that sums and thresholds of `t` are kept in.
inline ScalarType accumulator_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_threshold_guess(const char* op, const std::optional<Tensor>& guess) {
  FASTSAE_CHECK(!guess || guess->dim() == 0, op, ": expected threshold_guess to be [], got ",
                shape_of(*guess));
}

// The same in the dtype of thresholds of `x`.
inline std::optional<Tensor> threshold_guess(const char* op, const std::optional<Tensor>& guess,
                                             const Tensor& x) {
  check_threshold_guess(op, guess);
  if (!guess) return std::nullopt;
  return torch::stable::to(*guess, accumulator_type(x));
}

// A threshold for all columns, or one for each.
inline void check_threshold(const char* op, const Tensor& threshold, const Tensor& x,
                            int64_t columns) {
  if (threshold.dim() != 0) check_vector(op, "threshold", threshold, columns);
  FASTSAE_CHECK(threshold.scalar_type() == accumulator_type(x), op,
                ": expected threshold to be float32 (float64 for a float64 x)");
}

// Typed pointers; torch's own bfloat16 and half have the same layout.
template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data_of(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace fastsae
