// What batch_topk and threshold_select share: the selection in a matrix that is there.
#pragma once

#include "cpu/matrix_select.h"
#include "dispatch.h"
#include "selection.h"

namespace fastsae::cpu {

// The `capacity` largest entries of x [n, F] above the threshold. Threads own groups of rows; the
// result does not depend on them.
template <class T>
Selection select_entries(const Tensor& x, int64_t capacity, const Acc<T>* threshold,
                         bool per_column, const Acc<T>* threshold_guess) {
  using A = Acc<T>;
  const int64_t n = x.size(0);
  Selection out(x, n, capacity, x.scalar_type(), scalar_type_of<A>());
  MatrixSelect<A> selected(n, x.size(1), capacity, threshold, per_column);
  if (threshold_guess) selected.guess_threshold(*threshold_guess);
  selected.add(data_of<T>(x), static_cast<const A*>(nullptr), 0, n);
  *mutable_data_of<A>(out.threshold) =
      selected.finish(mutable_data_of<T>(out.values), mutable_data_of<int32_t>(out.indices),
                      mutable_data_of<int32_t>(out.offsets), capacity);
  return out;
}

}  // namespace fastsae::cpu
