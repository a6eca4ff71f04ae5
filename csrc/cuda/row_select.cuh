// The k largest of a row: what the kernels of topk are made of. Called by whole blocks.
//
// A candidate is one 64-bit number, the key of its value above the complement of its index: the
// larger one wins, so ties go to the lowest index, and no two are equal.
#pragma once

#include "cuda/block.cuh"
#include "cuda/number.cuh"

namespace fastsae::cuda {

// A row as selection sees it: x, or x + bias with the latents outside of `mask` at -inf.
template <class F, bool kAffine>
struct Row {
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  const Bits* x;
  const Acc* bias;   // [m] or null
  const bool* mask;  // [m] or null

  __device__ __forceinline__ bool masked(int j) const { return kAffine && mask && !mask[j]; }

  __device__ __forceinline__ Bits at(int j) const { return adjusted(x[j], j); }

  // 16 bytes from j on.
  __device__ __forceinline__ uint4 load(int j) const {
    uint4 v = load_once(x + j);
    if constexpr (kAffine && sizeof(Bits) == 4) {
      if (bias && (reinterpret_cast<uintptr_t>(bias + j) & 15) == 0) {
        const uint4 b = load_shared_by_all(bias + j);
        v = {sum(v.x, b.x), sum(v.y, b.y), sum(v.z, b.z), sum(v.w, b.w)};
      } else if (bias) {
        v = {add(v.x, j), add(v.y, j + 1), add(v.z, j + 2), add(v.w, j + 3)};
      }
      if (mask) v = {hide(v.x, j), hide(v.y, j + 1), hide(v.z, j + 2), hide(v.w, j + 3)};
    }
    return v;
  }

 private:
  __device__ __forceinline__ static Bits sum(Bits a, Bits b) {
    return F::narrow(F::widen(a) + F::widen(b));
  }
  __device__ __forceinline__ Bits add(Bits v, int j) const {
    return F::narrow(F::widen(v) + bias[j]);
  }
  __device__ __forceinline__ Bits hide(Bits v, int j) const {
    return mask[j] ? v : static_cast<Bits>(F::kSign | F::kInf);
  }
  __device__ __forceinline__ Bits adjusted(Bits v, int j) const {
    if constexpr (kAffine) {
      if (bias) v = add(v, j);
      if (mask) v = hide(v, j);
    }
    return v;
  }
};

// Key of a number that is exact in float32.
__device__ __forceinline__ uint32_t float_key(float x) {
  return Float32::key(Float32::narrow(x));
}
__device__ __forceinline__ uint64_t candidate(uint32_t key, int index) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~index);
}
__device__ __forceinline__ int index_of(uint64_t candidate) {
  return ~static_cast<int>(static_cast<uint32_t>(candidate));
}

// Shared memory of a selection.
struct SelectSpace {
  unsigned histogram[256];
  unsigned digit, rest, count;
};

// The need-th largest of the keys get(i), i < count, or a smaller number that separates the same
// ones from the rest. Digits of 8 bits, from `shift` down to `last`; bits below that are 0.
template <int kThreads, class Key, class Get>
__device__ __forceinline__ Key kth_key(int count, unsigned need, int shift, int last,
                                       SelectSpace& s, Get&& get, unsigned* still_needed) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31;
  Key prefix = 0, known = 0;
  for (; shift >= last; shift -= 8) {
    for (int i = tid; i < 256; i += kThreads) s.histogram[i] = 0;
    __syncthreads();  // zeroed before anyone counts
    for (int first = 0; first < count; first += kThreads) {
      const bool inside = first + tid < count;
      const Key key = inside ? get(first + tid) : Key(0);
      count_digit(s.histogram, static_cast<unsigned>(key >> shift) & 255u,
                  inside && static_cast<Key>(key & known) == prefix, lane);
    }
    __syncthreads();  // counted before the digit is looked for
    if (tid < 32) find_digit(s.histogram, need, lane, &s.digit, &s.rest);
    __syncthreads();  // found before everyone reads it
    prefix = static_cast<Key>(prefix | static_cast<Key>(s.digit) << shift);
    known = static_cast<Key>(known | Key(255) << shift);
    need = s.rest;
    const bool all = need == s.histogram[s.digit];
    __syncthreads();  // read before the next digit overwrites it
    if (all) break;
  }
  *still_needed = need;
  return prefix;
}

// A number that at least k elements of a row reach, from the maxima of disjoint groups of them,
// kMaxima per thread; exact in the upper 16 bits. -inf when it says nothing.
template <int kThreads, int kMaxima>
__device__ __forceinline__ float group_bound(const float (&maxima)[kMaxima], int k,
                                             SelectSpace& s) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31;
  uint32_t prefix = 0, known = 0;
  unsigned need = static_cast<unsigned>(k);
#pragma unroll
  for (int shift = 24; shift >= 16; shift -= 8) {
    for (int i = tid; i < 256; i += kThreads) s.histogram[i] = 0;
    __syncthreads();  // zeroed before anyone counts
#pragma unroll
    for (int g = 0; g < kMaxima; ++g) {
      const uint32_t key = float_key(maxima[g]);
      count_digit(s.histogram, key >> shift & 255u, (key & known) == prefix, lane);
    }
    __syncthreads();  // counted before the digit is looked for
    if (tid < 32) find_digit(s.histogram, need, lane, &s.digit, &s.rest);
    __syncthreads();  // found before everyone reads it
    prefix |= s.digit << shift;
    known |= 255u << shift;
    need = s.rest;
    __syncthreads();  // read before the next digit overwrites it
  }
  constexpr uint32_t kMinusInf = ~(Float32::kSign | Float32::kInf);  // its key
  return Float32::widen(Float32::from_key(prefix < kMinusInf ? kMinusInf : prefix));
}

// The k largest of the `size` elements of a row from `first` on, in ascending index:
// emit(place, index). By radix selection on all of the row: as many reads of it as a key has bytes,
// less where the digits settle it earlier, and one more.
template <int kThreads, class F, bool kAffine, class Emit>
__device__ __forceinline__ void radix_select(const Row<F, kAffine>& row, int first, int size,
                                             unsigned k, SelectSpace& s, unsigned* warp_counts,
                                             Emit&& emit) {
  using Bits = typename F::Bits;
  constexpr int kWarps = kThreads / 32;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5;
  unsigned ties = 0;
  const Bits least = kth_key<kThreads, Bits>(
      size, k, F::kBits - 8, 0, s, [&](int j) { return F::key(row.at(first + j)); }, &ties);
  unsigned above_before = 0, equal_before = 0;
  for (int begin = 0; begin < size; begin += kThreads) {
    const int j = begin + tid;
    const Bits key = j < size ? F::key(row.at(first + j)) : Bits(0);
    const bool above = j < size && key > least, equal = j < size && key == least;
    const unsigned above_lanes = __ballot_sync(kFullWarp, above);
    const unsigned equal_lanes = __ballot_sync(kFullWarp, equal);
    if (lane == 0) {
      warp_counts[warp] = static_cast<unsigned>(__popc(above_lanes));
      warp_counts[kWarps + warp] = static_cast<unsigned>(__popc(equal_lanes));
    }
    __syncthreads();  // all warps have counted
    const unsigned lower = (1u << lane) - 1u;
    unsigned above_here = above_before + static_cast<unsigned>(__popc(above_lanes & lower));
    unsigned equal_here = equal_before + static_cast<unsigned>(__popc(equal_lanes & lower));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) {
        above_here += warp_counts[w];
        equal_here += warp_counts[kWarps + w];
      }
      above_before += warp_counts[w];
      equal_before += warp_counts[kWarps + w];
    }
    if (above || (equal && equal_here < ties)) {
      emit(static_cast<int>(above_here + (equal_here < ties ? equal_here : ties)), first + j);
    }
    __syncthreads();  // counts read before the next tile overwrites them
  }
}

}  // namespace fastsae::cuda
