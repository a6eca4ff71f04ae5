// What the ops return that select entries of a whole matrix, on any device.
#pragma once

#include <tuple>

#include "check.h"

namespace fastsae {

struct Selection {
  Tensor values, indices;  // [capacity]
  Tensor offsets;          // [n + 1]
  Tensor threshold;        // []: the smallest value kept

  // Of n rows, on the device of `like`.
  Selection(const Tensor& like, int64_t n, int64_t capacity, ScalarType values_type,
            ScalarType threshold_type)
      : values(new_empty(like, {capacity}, values_type)),
        indices(new_empty(like, {capacity}, ScalarType::Int)),
        offsets(new_empty(like, {n + 1}, ScalarType::Int)),
        threshold(new_empty(like, {}, threshold_type)) {}

  std::tuple<Tensor, Tensor, Tensor> entries() const { return {values, indices, offsets}; }
  std::tuple<Tensor, Tensor, Tensor, Tensor> entries_and_threshold() const {
    return {values, indices, offsets, threshold};
  }
};

}  // namespace fastsae
