// The search for the need-th largest of many keys, 11 bits at a time, over the kernels of a
// selection: one counts the digits of the keys that are still in question, the next one finds the
// digit that holds the key.
#pragma once

#include "cuda/block.cuh"
#include "cuda/number.cuh"

namespace fastsae::cuda {

using Count = unsigned long long;  // what atomicAdd calls 64 bits

constexpr int kSelectThreads = 256;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;

// Keys are those of the numbers that are compared: of float, or of double for float64.
template <class F>
using AccFormatOf = typename FormatOf<typename F::Acc>::type;
template <class F>
using KeyOf = typename AccFormatOf<F>::Bits;

// The digits that tell keys apart: the last bits of a 16-bit number's float key say nothing.
template <class F>
struct KeyDigits {
  static constexpr int kBits = AccFormatOf<F>::kBits;
  static constexpr int kPasses =
      sizeof(typename F::Bits) == 2 ? 2 : (kBits + kDigitBits - 1) / kDigitBits;

  __device__ static constexpr int width(int pass) {
    return kBits - kDigitBits * pass < kDigitBits ? kBits - kDigitBits * pass : kDigitBits;
  }
  __device__ static constexpr int shift(int pass) {
    return kBits - kDigitBits * pass - width(pass);
  }
};

// Where the search stands: the key has `prefix` in the bits of prefix_mask, and is the need-th
// largest of those that do. kept_count: keys that are above or equal, as many as are kept.
template <class Key>
struct Progress {
  Key prefix, prefix_mask;
  Count need, kept_count;

  __device__ __forceinline__ bool above(Key key) const {
    return static_cast<Key>(key & prefix_mask) > prefix;
  }
  __device__ __forceinline__ bool equal(Key key) const {
    return static_cast<Key>(key & prefix_mask) == prefix;
  }
};

// A search in global memory; zeroed before its first kernel.
template <class F>
struct DigitSearch {
  Progress<KeyOf<F>> progress[KeyDigits<F>::kPasses + 1];
  Count histogram[KeyDigits<F>::kPasses][kDigits];
};

struct DigitSpace {
  Count sums[kSelectThreads / 32];
  Count rest;
  unsigned digit;
};

// Finds the digit that holds the need-th largest key (the last one if there are fewer), and how
// many are needed inside it: s.digit and s.rest; returns the number of keys. Nothing is found if
// there are none, or none is needed. Called by the whole block; ends with a barrier.
__device__ inline Count find_large_digit(const Count* histogram, Count need, DigitSpace& s) {
  constexpr int kOwn = kDigits / kSelectThreads;
  const int top = kDigits - 1 - kOwn * static_cast<int>(threadIdx.x);
  Count own = 0;
  for (int b = 0; b < kOwn; ++b) own += histogram[top - b];
  Count total;
  Count above = block_exclusive_sum<kSelectThreads>(own, s.sums, &total);
  if (need > total) need = total;
  if (above < need && need <= above + own) {  // one thread goes on
    int digit = top;
    for (; need > above + histogram[digit]; --digit) above += histogram[digit];
    s.digit = static_cast<unsigned>(digit);
    s.rest = need - above;
  }
  __syncthreads();  // found before everyone reads it
  return total;
}

// What is known before digit `pass` of the budget-th largest key; the same in every block.
template <class F>
__device__ __forceinline__ Progress<KeyOf<F>> known_before(DigitSearch<F>& search, Count budget,
                                                           int pass, DigitSpace& s) {
  using Key = KeyOf<F>;
  Progress<Key> p{0, 0, budget, budget};
  if (pass == 0) return p;
  if (pass > 1) p = search.progress[pass - 1];
  const Count total = find_large_digit(search.histogram[pass - 1], p.need, s);
  if (pass == 1 && total < p.kept_count) p.kept_count = total;
  if (p.kept_count == 0) {
    p.prefix = p.prefix_mask = static_cast<Key>(~Key(0));
  } else {
    const int shift = KeyDigits<F>::shift(pass - 1);
    p.prefix |= static_cast<Key>(s.digit) << shift;
    p.prefix_mask |= ((Key(1) << KeyDigits<F>::width(pass - 1)) - 1) << shift;
    p.need = s.rest;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) search.progress[pass] = p;
  return p;
}

// A block's own histogram: zeroed, and added to one in global memory.
__device__ __forceinline__ void clear_digits(unsigned* histogram) {
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kSelectThreads) histogram[i] = 0;
  __syncthreads();  // zeroed before anyone counts
}
__device__ __forceinline__ void add_digits(const unsigned* histogram, Count* to) {
  __syncthreads();  // counted before the sums are passed on
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kSelectThreads) {
    if (histogram[i]) atomicAdd(&to[i], static_cast<Count>(histogram[i]));
  }
}

}  // namespace fastsae::cuda
