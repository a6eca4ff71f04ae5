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
  using Format = F;
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  const Bits* x;
  const Acc* bias;   // [m] or null
  const bool* mask;  // [m] or null

  __device__ __forceinline__ bool masked(int j) const { return kAffine && mask && !mask[j]; }

  __device__ __forceinline__ Bits at(int j) const { return adjusted(x[j], j); }

  // Vectors of 16 bytes, v[i] from element j + i step on, of those that begin below `end`. Issues
  // all loads before consuming any.
  template <int kVectors>
  __device__ __forceinline__ void load(uint4 (&v)[kVectors], int j, int step, int end) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (j + i * step < end) v[i] = load_once(x + j + i * step);
    }
    if constexpr (kAffine && sizeof(Bits) == 4) {
      if (bias && (reinterpret_cast<uintptr_t>(bias + j) & 15) == 0) {
        constexpr int kAtOnce = 4;  // as many as registers allow
#pragma unroll
        for (int first = 0; first < kVectors; first += kAtOnce) {
          uint4 b[kAtOnce] = {};
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int at = j + (first + i) * step;
            if (at < end) b[i] = load_again(bias + at, at < kKept);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) v[first + i] = sum(v[first + i], b[i]);
        }
      } else if (bias) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int at = j + i * step;
          if (at < end) v[i] = each(v[i], at, [&](Bits a, int e) { return add(a, e); });
        }
      }
      if (mask) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int at = j + i * step;
          if (at < end) v[i] = each(v[i], at, [&](Bits a, int e) { return hide(a, e); });
        }
      }
    }
  }

 private:
  // Numbers of the bias that every row should find in the first-level cache: 128 KiB, which
  // Hopper's holds along with the stream of x.
  static constexpr int kKept = 1 << 15;

  template <class Change>
  __device__ __forceinline__ static uint4 each(const uint4& v, int j, Change&& change) {
    return {change(v.x, j), change(v.y, j + 1), change(v.z, j + 2), change(v.w, j + 3)};
  }
  __device__ __forceinline__ static uint4 sum(const uint4& a, const uint4& b) {
    return {sum(a.x, b.x), sum(a.y, b.y), sum(a.z, b.z), sum(a.w, b.w)};
  }
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

// Shared memory of a selection. Before the first one, and after each, the histogram is zero.
struct SelectSpace {
  alignas(16) unsigned histogram[256];
  Digit found;
  unsigned candidate_count, winner_count;
};

__device__ __forceinline__ void clear_histogram(SelectSpace& s) {
  for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) s.histogram[i] = 0;
  __syncthreads();  // zero before anyone counts
}

// The digit of the need-th largest key, from what the block has counted.
__device__ __forceinline__ Digit found_digit(SelectSpace& s, unsigned need) {
  __syncthreads();  // counted before the digit is looked for
  if (threadIdx.x < 32) find_digit(s.histogram, need, static_cast<int>(threadIdx.x), &s.found);
  __syncthreads();  // found, and the histogram zero, before it is used
  return s.found;
}

// The need-th largest of the keys get(i), i < count, or a smaller number that at most `spare` more
// keys reach. Digits of 8 bits, from the uppermost down.
template <int kThreads, class Key, class Get>
__device__ __forceinline__ Key kth_key(int count, unsigned need, unsigned spare, SelectSpace& s,
                                       Get&& get, unsigned* still_needed) {
  Key prefix = 0, known = 0;
  for (int shift = 8 * int{sizeof(Key)} - 8; shift >= 0; shift -= 8) {
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const Key key = get(i);
      if (static_cast<Key>(key & known) == prefix) {
        atomicAdd(&s.histogram[static_cast<unsigned>(key >> shift) & 255u], 1u);
      }
    }
    const Digit found = found_digit(s, need);
    prefix = static_cast<Key>(prefix | static_cast<Key>(found.digit) << shift);
    known = static_cast<Key>(known | Key(255) << shift);
    need = found.rest;
    if (found.size - found.rest <= spare) break;
  }
  *still_needed = need;
  return prefix;
}

// A number that at least k elements of a row reach, from the maxima of disjoint groups of them,
// kMaxima per thread; exact in the upper 16 bits. -inf when it says nothing.
template <int kMaxima>
__device__ __forceinline__ float group_bound(const float (&maxima)[kMaxima], int k,
                                             SelectSpace& s) {
  uint32_t prefix = 0, known = 0;
  unsigned need = static_cast<unsigned>(k);
#pragma unroll
  for (int shift = 24; shift >= 16; shift -= 8) {
#pragma unroll
    for (int g = 0; g < kMaxima; ++g) {
      const uint32_t key = float_key(maxima[g]);
      if ((key & known) == prefix) atomicAdd(&s.histogram[key >> shift & 255u], 1u);
    }
    const Digit found = found_digit(s, need);
    prefix |= found.digit << shift;
    known |= 255u << shift;
    need = found.rest;
  }
  constexpr uint32_t kMinusInf = ~(Float32::kSign | Float32::kInf);  // its key
  return Float32::widen(Float32::from_key(prefix < kMinusInf ? kMinusInf : prefix));
}

// The k largest of the `size` elements of a row from `first` on, in ascending index:
// emit(place, index). By radix selection on all of the row: as many reads of it as a key has bytes,
// less where the digits settle it earlier, and one more.
template <int kThreads, class AnyRow, class Emit>
__device__ __forceinline__ void radix_select(const AnyRow& row, int first, int size, unsigned k,
                                             SelectSpace& s, unsigned* warp_counts, Emit&& emit) {
  using F = typename AnyRow::Format;
  using Bits = typename F::Bits;
  constexpr int kWarps = kThreads / 32;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5;
  unsigned ties = 0;
  const Bits least = kth_key<kThreads, Bits>(
      size, k, 0, s, [&](int j) { return F::key(row.at(first + j)); }, &ties);
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
