// The library's own matmul: c [m, n] = a [m, k] b [k, n], of float or double, any strides.
//
// As the encoder's (see tile_impl.h): a tile of some rows of a lies in the first-level cache,
// panels of b in the second, both packed, and a block of c is summed up in registers. k is cut into
// blocks whose sums are added in order, the same blocks whatever the threads, so the bits do not
// depend on them.
#pragma once

#include "cpu/aligned_buffer.h"
#include "cpu/kernels.h"

namespace fastsae::cpu {

// A matrix with element (i, j) at data[i * row + j * column]; one of the steps is 1.
template <class A>
struct Strided {
  const A* data;
  int64_t row, column;
};

// What becomes of an element of c [m, n] when its sum is there.
template <class A>
struct Finish {
  const A* bias = nullptr;   // [n], added
  bool relu = false;         // then 0 where negative
  const A* where = nullptr;  // [m, n]: then 0 where this is 0

  // `out` are elements [j, j + count) of row i.
  void apply(A* out, int64_t i, int64_t j, int64_t count, int64_t n) const {
    if (bias) {
      for (int64_t t = 0; t < count; ++t) out[t] += bias[j + t];
    }
    if (relu) {
      for (int64_t t = 0; t < count; ++t) out[t] = out[t] < A(0) ? A(0) : out[t];
    }
    if (where) {
      const A* at = where + i * n + j;
      for (int64_t t = 0; t < count; ++t) out[t] = at[t] == A(0) ? A(0) : out[t];
    }
  }
};

// c is contiguous. m, n and k may be 0.
template <class A>
void matmul(int64_t m, int64_t n, int64_t k, Strided<A> a, Strided<A> b, const Finish<A>& finish,
            A* c);

extern template void matmul(int64_t, int64_t, int64_t, Strided<float>, Strided<float>,
                            const Finish<float>&, float*);
extern template void matmul(int64_t, int64_t, int64_t, Strided<double>, Strided<double>,
                            const Finish<double>&, double*);

}  // namespace fastsae::cpu
