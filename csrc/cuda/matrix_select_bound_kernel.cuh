// Stage 1 of a selection in a whole matrix: a lower bound from a sample.
#pragma once

#include "cuda/matrix_select_args.cuh"

namespace fastsae::cuda {

// Keeps the leading bits of the keys of evenly spaced vectors of the matrix, and counts the first
// digit.
template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads) sample_kernel(SelectArgs<F> a) {
  using AccFormat = AccFormatOf<F>;
  using Key = KeyOf<F>;
  constexpr int E = F::kVector;
  __shared__ unsigned histogram[kDigits];
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const typename F::Acc threshold = a.in.common_threshold();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  clear_digits(histogram);
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kSelectThreads;
       begin < a.plan.sample_vectors; begin += stride) {
    const int64_t j = begin + threadIdx.x;
    const bool inside = j < a.plan.sample_vectors;
    typename F::Acc value[E];
    if (inside) {
      const int64_t i = j * (a.in.total / E) / a.plan.sample_vectors * E;
      const int c = kColumns ? static_cast<int>(i % a.in.m) : 0;
      VectorColumns<F> columns;
      if constexpr (kColumns) columns.load(a.in, c, a.in.whole_columns());
      entry_values<F, kColumns>(a.in, load_entries<F>(a.in.bits, i, a.in.total), columns, i, c,
                                value);
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      uint32_t code = 0;
      if (inside && value[e] > threshold) {
        const Key key = AccFormat::key(AccFormat::narrow(value[e]));
        code = static_cast<uint32_t>(key >> (AccFormat::kBits - kSampleBits));
      }
      if (inside) a.scratch.sample[j * E + e] = code;
      count_digit(histogram, code >> kDigitBits, inside, lane);
    }
  }
  add_digits(histogram, a.scratch.header->sample_histogram[0]);
}

// Counts the second digit of those that have the first one of the bound.
template <class F>
__global__ void __launch_bounds__(kSelectThreads) refine_sample_kernel(SelectArgs<F> a) {
  __shared__ unsigned histogram[kDigits];
  __shared__ DigitSpace space;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  const int64_t size = a.plan.sample_vectors * F::kVector;
  find_large_digit(a.scratch.header->sample_histogram[0], static_cast<Count>(a.plan.sample_rank),
                   space);
  const unsigned digit = space.digit;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    a.scratch.header->sample.prefix = digit;
    a.scratch.header->sample.need = space.rest;
  }
  clear_digits(histogram);
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kSelectThreads; begin < size;
       begin += stride) {
    const int64_t j = begin + threadIdx.x;
    const uint32_t code = j < size ? a.scratch.sample[j] : 0;
    count_digit(histogram, code & (kDigits - 1), j < size && code >> kDigitBits == digit, lane);
  }
  add_digits(histogram, a.scratch.header->sample_histogram[1]);
}

// The bound of the filter; the same in every block.
template <class F>
__device__ __forceinline__ typename F::Acc filter_bound(const SelectArgs<F>& a, DigitSpace& s) {
  using AccFormat = AccFormatOf<F>;
  using Key = KeyOf<F>;
  using Acc = typename F::Acc;
  const Acc threshold = a.in.common_threshold();
  Acc lower_bound = threshold;
  if (a.plan.sample_vectors) {
    const Progress<Key> sample = a.scratch.header->sample;
    find_large_digit(a.scratch.header->sample_histogram[1], sample.need, s);
    const Key code = static_cast<Key>(sample.prefix << kDigitBits | s.digit);
    // Just below the smallest number with these leading bits.
    const Key key = static_cast<Key>(code << (AccFormat::kBits - kSampleBits));
    if (key > 0) lower_bound = AccFormat::widen(AccFormat::from_key(static_cast<Key>(key - 1)));
  }
  const bool better = lower_bound > threshold;
  if (blockIdx.x == 0 && threadIdx.x == 0) a.scratch.header->sampled = better;
  return better ? lower_bound : threshold;
}

}  // namespace fastsae::cuda
