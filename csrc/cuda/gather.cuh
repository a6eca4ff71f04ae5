// Rows picked from a matrix by index: what every sparse matmul is made of.
//
// A warp sums a strip of columns, `kPacks` packs per lane, over the entries of one list. It reads
// 32 entries at a time, one per lane, passes them on by shuffles, and has the loads of kRows rows
// in flight before it adds the first. Sums run in the order of the entries, one accumulator per
// column, so they depend neither on the grid nor on how the columns are split. Products with rows
// take kDotRows of them side by side and add up lanes at the end.
#pragma once

#include "cuda/block.cuh"
#include "cuda/pack.cuh"
#include "cuda/sparse_acts.h"

namespace fastsae::cuda {

// One entry as a lane holds it; weight 0: none, or inactive.
template <class A>
struct Entry {
  int index;
  A weight;
};

// Sparse activations; F is the format of the matrix they meet.
template <class F>
struct SparseActsView {
  using Acc = typename F::Acc;
  using Bits = typename F::Bits;
  SparseActsParams p;

  // Positions of the entries of a row. Bad offsets lead nowhere.
  __device__ __forceinline__ int begin(int64_t row) const { return at(row); }
  __device__ __forceinline__ int end(int64_t row) const { return at(row + 1); }

  __device__ __forceinline__ Acc value(int j) const {
    if (p.wide) return static_cast<const Acc*>(p.values)[j];
    return F::widen(static_cast<const Bits*>(p.values)[j]);
  }
  __device__ __forceinline__ Entry<Acc> entry(int j) const {
    const int index = p.indices[j];
    const bool inside = static_cast<unsigned>(index) < static_cast<unsigned>(p.d_sae);
    return {index, inside ? value(j) : Acc(0)};
  }

 private:
  __device__ __forceinline__ int at(int64_t row) const {
    if (!p.offsets) return static_cast<int>(row * p.k);
    return min(max(p.offsets[row], 0), p.capacity);
  }
};

// The columns of one lane: packs first, first + 32, ... of a row of `packs` packs.
template <class F, bool kWide, int kPacks>
struct Strip {
  using P = Pack<F, kWide>;
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  using Sum = Acc[kPacks][P::kSize];
  int first, packs;

  __device__ __forceinline__ Strip(int chunk, int lane, int packs)
      : first(chunk * 32 * kPacks + lane), packs(packs) {}

  __device__ __forceinline__ bool has(int i) const { return first + 32 * i < packs; }
  __device__ __forceinline__ int column(int i) const { return (first + 32 * i) * P::kSize; }

  // A row of numbers of the format `From`, or 0 if null.
  template <class From = F>
  __device__ __forceinline__ void start(Sum& sum, const typename From::Bits* row) const {
    read<From>(sum, row, [](Acc& to, Acc x) { to = x; });
  }
  // Adds a row of numbers of the format `From`.
  template <class From>
  __device__ __forceinline__ void add(Sum& sum, const typename From::Bits* row) const {
    read<From>(sum, row, [](Acc& to, Acc x) { to += x; });
  }
  // Stores the sums as numbers of the format `To`.
  template <class To = F>
  __device__ __forceinline__ void store(const Sum& sum, typename To::Bits* row) const {
    using Out = Pack<To, kWide>;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!has(i)) continue;
#pragma unroll
      for (int from = 0; from < P::kSize; from += Out::kSize) {
        Acc x[Out::kSize];
#pragma unroll
        for (int e = 0; e < Out::kSize; ++e) x[e] = sum[i][from + e];
        Out::store(row + column(i) + from, x);
      }
    }
  }

 private:
  template <class From, class Take>
  __device__ __forceinline__ void read(Sum& sum, const typename From::Bits* row,
                                       Take&& take) const {
    using In = Pack<From, kWide>;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const bool read = row && has(i);
#pragma unroll
      for (int to = 0; to < P::kSize; to += In::kSize) {
        const typename In::Raw raw = read ? In::load(row + column(i) + to) : typename In::Raw{};
#pragma unroll
        for (int e = 0; e < In::kSize; ++e) take(sum[i][to + e], In::at(raw, e));
      }
    }
  }
};

// Rows in flight: about 12 accesses of a lane are enough to hide the memory, and fit the registers.
template <int kPacks>
constexpr int kRowsInFlight = kPacks == 1 ? 8 : 4;
// Blocks of 128 threads on a multiprocessor, at least.
template <int kPacks>
constexpr int kGatherBlocks = kPacks <= 2 ? 5 : 4;

// sum += weight * rows[index] over the entries get(j), begin <= j < end. Called by a whole warp.
template <class F, bool kWide, int kPacks, class Get>
__device__ __forceinline__ void gather_sum(const Strip<F, kWide, kPacks>& strip,
                                           typename Strip<F, kWide, kPacks>::Sum& sum, int begin,
                                           int end, const typename F::Bits* rows, int64_t d,
                                           Get&& get) {
  using P = Pack<F, kWide>;
  using Acc = typename F::Acc;
  constexpr int kRows = kRowsInFlight<kPacks>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const auto read = [&](int base) {
    return lane < end - base ? get(base + lane) : Entry<Acc>{0, Acc(0)};
  };
  Entry<Acc> next = read(begin);
  for (int done = 0; done < end - begin; done += 32) {
    const Entry<Acc> own = next;
    if (done + 32 < end - begin) next = read(begin + done + 32);
    unsigned left = __ballot_sync(kFullWarp, own.weight != Acc(0));
    while (left) {
      const int count = __popc(left);
      typename P::Raw held[kRows][kPacks];
      Acc weight[kRows];
      int from = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (left) from = __ffs(static_cast<int>(left)) - 1;  // past the last one: that again
        left &= left - 1;
        const int index = __shfl_sync(kFullWarp, own.index, from);
        weight[r] = __shfl_sync(kFullWarp, own.weight, from);
        const typename F::Bits* row = rows + index * d;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          held[r][i] = strip.has(i) ? P::load(row + strip.column(i)) : typename P::Raw{};
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= count) continue;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
#pragma unroll
          for (int e = 0; e < P::kSize; ++e) sum[i][e] += weight[r] * P::at(held[r][i], e);
        }
      }
    }
  }
}

constexpr int kDotRows = 8;  // rows that are multiplied side by side

// Sums of 8 numbers over lanes, in a fixed order: lanes 4r to 4r + 3 get the sum of number r.
template <class T>
__device__ __forceinline__ T warp_sum_8(T (&x)[8], int lane) {
#pragma unroll
  for (int half = 4; half > 0; half >>= 1) {  // every lane gives away half of its numbers
    const bool upper = lane & (half << 2);
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const T given = upper ? x[r] : x[r + half], kept = upper ? x[r + half] : x[r];
      x[r] = kept + __shfl_xor_sync(kFullWarp, given, half << 2);
    }
  }
  x[0] += __shfl_xor_sync(kFullWarp, x[0], 2);
  return x[0] + __shfl_xor_sync(kFullWarp, x[0], 1);
}

// Numbers of the format `From` as they were read, as many as a pack of F has, widened where they
// are used.
template <class F, class From, bool kWide>
struct HeldPack {
  using In = Pack<From, kWide>;
  static constexpr int kSize = Pack<F, kWide>::kSize;
  typename In::Raw raw[kSize / In::kSize];
  __device__ __forceinline__ explicit HeldPack(const typename From::Bits* row) {
#pragma unroll
    for (int i = 0; i < kSize / In::kSize; ++i) raw[i] = In::load(row + i * In::kSize);
  }
  __device__ __forceinline__ typename F::Acc at(int e) const {
    return In::at(raw[e / In::kSize], e % In::kSize);
  }
};

// The product of a row of `packs` packs with the row of `rows` that the lane's entry names, 0
// without an entry. load(p) reads pack p of the row: number e of it is load(p).at(e). Called by a
// whole warp.
template <class F, bool kWide, class Load>
__device__ __forceinline__ typename F::Acc gather_dot(const Entry<typename F::Acc>& own,
                                                      const typename F::Bits* rows, int64_t d,
                                                      int packs, Load&& load) {
  using P = Pack<F, kWide>;
  using Acc = typename F::Acc;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  unsigned left = __ballot_sync(kFullWarp, own.weight != Acc(0));
  // The dot product of the lane's entry comes out of round place / kDotRows.
  const int place = own.weight != Acc(0) ? __popc(left & ((1u << lane) - 1u)) : -1;
  Acc product = 0;
  for (int round = 0; left; ++round) {
    const typename F::Bits* row[kDotRows];
    int from = 0;
#pragma unroll
    for (int r = 0; r < kDotRows; ++r) {
      if (left) from = __ffs(static_cast<int>(left)) - 1;  // past the last one: that again
      left &= left - 1;
      row[r] = rows + __shfl_sync(kFullWarp, own.index, from) * d;
    }
    Acc dot[kDotRows] = {};
    for (int p = lane; p < packs; p += 32) {
      typename P::Raw held[kDotRows];
#pragma unroll
      for (int r = 0; r < kDotRows; ++r) held[r] = P::load(row[r] + p * P::kSize);
      const auto own_pack = load(p);
#pragma unroll
      for (int r = 0; r < kDotRows; ++r) {
#pragma unroll
        for (int e = 0; e < P::kSize; ++e) dot[r] += own_pack.at(e) * P::at(held[r], e);
      }
    }
    const Acc total = warp_sum_8(dot, lane);
    const Acc mine = __shfl_sync(kFullWarp, total, 4 * (place & 7));
    if (place >= 0 && place / kDotRows == round) product = mine;
  }
  return product;
}

// ---- the host's side ----

// Whether rows of d elements from p on can be read 16 bytes at a time.
template <class F>
bool rows_aligned(const void* p, int64_t d) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(d) * sizeof(typename F::Bits)) %
             16 ==
         0;
}

// How warps share the rows of `lists` sums.
struct Split {
  int packs;     // of a row
  int per_lane;  // kPacks
  int chunks;    // strips of a row, at least 1
};

// Rows of single elements.
inline Split split_elements(int d) {
  return {d, 4, d == 0 ? 1 : (d + 127) / 128};
}

// Packs per lane, 1 to 4: so that few lanes idle at the end of a row, but enough warps work.
inline Split split_row(int packs, int64_t lists) {
  if (packs == 0) return {0, 1, 1};
  constexpr int kMost = 4;
  const int64_t wanted = 8 * int64_t{multiprocessors()};
  Split best{packs, 1, (packs + 31) / 32};
  for (int per_lane = 2; per_lane <= kMost; ++per_lane) {
    const int chunks = (packs + 32 * per_lane - 1) / (32 * per_lane);
    if (lists * chunks < wanted) break;
    if (chunks * per_lane <= best.chunks * best.per_lane) best = {packs, per_lane, chunks};
  }
  return best;
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f with the number of packs per lane as a Constant.
template <class Call>
void with_packs(int per_lane, Call&& f) {
  if (per_lane == 1) f(Constant<1>{});
  if (per_lane == 2) f(Constant<2>{});
  if (per_lane == 3) f(Constant<3>{});
  if (per_lane == 4) f(Constant<4>{});
}

}  // namespace fastsae::cuda
