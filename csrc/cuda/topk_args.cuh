// What the kernels of topk get.
#pragma once

#include "cuda/row_select.cuh"
#include "cuda/topk.h"

namespace fastsae::cuda {

// Arguments of the kernels, typed.
template <class F>
struct TopkArgs {
  const typename F::Bits* x;
  const typename F::Acc* bias;
  const bool* mask;
  int64_t n;
  int m, k;
  bool sorted, relu;
  typename F::Bits* values;
  int32_t* indices;
  int parts, part_size;  // parts of a row, and their elements
  int capacity;          // of candidates in shared memory
  int winner_capacity;   // of those that are taken from them
  int64_t ahead;         // rows that are worked on at a time
  uint64_t* partial;     // [n, parts, k] candidates of the parts

  template <bool kAffine>
  __device__ __forceinline__ Row<F, kAffine> row(int64_t r) const {
    return {x + r * m, bias, mask};
  }

  // Entry `to` of the output is the element `index` of the row, and these its bits.
  template <bool kAffine>
  __device__ __forceinline__ void write(int64_t to, const Row<F, kAffine>& row, int index,
                                        typename F::Bits bits) const {
    if constexpr (kAffine) {
      if (row.masked(index) || (relu && F::widen(bits) <= 0)) bits = 0;
    }
    values[to] = bits;
    indices[to] = index;
  }

  // The same from a candidate. Its key tells the value, but for NaN and the sign of a zero.
  template <bool kAffine>
  __device__ __forceinline__ void write(int64_t to, const Row<F, kAffine>& row, uint64_t c) const {
    const uint32_t key = static_cast<uint32_t>(c >> 32);
    const int index = index_of(c);
    const bool told = key != ~0u && key != Float32::kSign;
    write(to, row, index, told ? F::narrow(Float32::widen(Float32::from_key(key))) : row.at(index));
  }
};

}  // namespace fastsae::cuda
