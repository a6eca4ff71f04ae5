// A matrix as a selection in all of it sees it: x + bias where mask is true, above a threshold for
// all columns or for each.
#pragma once

#include "cuda/digit_search.cuh"

namespace fastsae::cuda {

template <class F>
struct MatrixView {
  using Acc = typename F::Acc;
  const typename F::Bits* bits;  // [n, m]
  const Acc* bias;               // [m] or null
  const bool* mask;              // [m] or null
  const Acc* threshold;          // [] or, if per_column, [m]; null for 0
  const int32_t* tie_row;        // [m]: equal entries too, in rows up to this; or null
  int64_t n, total;              // rows, entries
  int m;
  bool per_column;

  // What every entry has to exceed.
  __device__ __forceinline__ Acc common_threshold() const {
    if (per_column) return -static_cast<Acc>(__builtin_huge_val());
    return threshold ? *threshold : Acc(0);
  }
  // Whether what is known about the columns of a vector lies in aligned 16 bytes.
  __device__ __forceinline__ bool whole_columns() const {
    const auto address = reinterpret_cast<uintptr_t>(bias) | reinterpret_cast<uintptr_t>(threshold);
    return m % F::kVector == 0 && (address & 15) == 0;
  }
};

// 16 bytes of x from entry i on, whatever the alignment; what lies past the end is NaN.
template <class F>
__device__ __forceinline__ uint4 load_entries(const typename F::Bits* x, int64_t i, int64_t total) {
  constexpr int E = F::kVector;
  constexpr typename F::Bits kNaN = static_cast<typename F::Bits>(~F::kSign);
  typename F::Bits parts[E];
#pragma unroll
  for (int e = 0; e < E; ++e) parts[e] = i + e < total ? x[i + e] : kNaN;
  uint4 v;
  memcpy(&v, parts, sizeof v);
  return v;
}

// per_column[c], per_column[c + 1], ..., going on at column 0; `whole`: these are aligned 16 bytes.
template <int E, class Acc>
__device__ __forceinline__ void load_columns(const Acc* per_column, int c, int m, bool whole,
                                             Acc (&out)[E]) {
  if (whole) {
    uint4 parts[E * sizeof(Acc) / 16];
#pragma unroll
    for (unsigned i = 0; i < E * sizeof(Acc) / 16; ++i) {
      parts[i] = load_shared_by_all(per_column + c + i * (16 / sizeof(Acc)));
    }
    memcpy(out, parts, sizeof out);
    return;
  }
#pragma unroll
  for (int e = 0; e < E; ++e) {
    out[e] = per_column[c];
    if (++c == m) c = 0;
  }
}

// What is known about the columns of a vector of entries.
template <class F>
struct VectorColumns {
  static constexpr int E = F::kVector;
  typename F::Acc bias[E] = {}, threshold[E] = {};

  __device__ __forceinline__ void load(const MatrixView<F>& x, int c, bool whole) {
    if (x.bias) load_columns<E>(x.bias, c, x.m, whole, bias);
    if (x.per_column) load_columns<E>(x.threshold, c, x.m, whole, threshold);
  }
};

// The numbers of a vector of entries, from entry i and column c on: NaN for those that are
// ignored. With kColumns there is something to know about columns.
template <class F, bool kColumns>
__device__ __forceinline__ void entry_values(const MatrixView<F>& x, const uint4& v,
                                             const VectorColumns<F>& columns, int64_t i, int c,
                                             typename F::Acc (&out)[F::kVector]) {
  using Acc = typename F::Acc;
  constexpr int E = F::kVector;
  constexpr Acc kNone = static_cast<Acc>(__builtin_nan(""));
#pragma unroll
  for (int e = 0; e < E; ++e) out[e] = F::widen(element<F>(v, e));
  if constexpr (kColumns) {
    if (x.bias) {
#pragma unroll
      for (int e = 0; e < E; ++e) out[e] += columns.bias[e];
    }
    if (x.per_column) {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        bool in = out[e] > columns.threshold[e];
        if (!in && x.tie_row && out[e] == columns.threshold[e]) {
          in = (i + e) / x.m <= x.tie_row[(c + e) % x.m];
        }
        if (!in) out[e] = kNone;
      }
    }
    if (x.mask) {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if (!x.mask[c]) out[e] = kNone;
        if (++c == x.m) c = 0;
      }
    }
  }
}

// Whether a number of the vector is above the lower_bound.
template <class F>
__device__ __forceinline__ bool any_above(const uint4& v, typename F::Acc lower_bound) {
  if constexpr (F::kVector > 2) {
    const uint32_t largest = F::larger(F::larger(v.x, v.y), F::larger(v.z, v.w));
    bool any = false;
#pragma unroll
    for (int e = 0; e < F::kVector / 4; ++e) any |= number<F>(largest, e) > lower_bound;
    return any;
  } else {
    return true;
  }
}

// The key of one entry, 0 if it is ignored.
template <class F, bool kColumns>
__device__ __forceinline__ KeyOf<F> entry_key(const MatrixView<F>& x, int64_t i, int c,
                                              typename F::Acc least) {
  using AccFormat = AccFormatOf<F>;
  typename F::Acc v = F::widen(x.bits[i]);
  if constexpr (kColumns) {
    if (x.mask && !x.mask[c]) return 0;
    if (x.bias) v += x.bias[c];
    if (x.per_column) {
      const typename F::Acc threshold = x.threshold[c];
      if (!(v > threshold) && !(x.tie_row && v == threshold && i / x.m <= x.tie_row[c])) return 0;
    }
  }
  return v > least ? AccFormat::key(AccFormat::narrow(v)) : 0;
}

}  // namespace fastsae::cuda
