// For each column of x [n, columns], what its m largest positive entries are above: theta, and the
// last row that is kept of those equal to it. The selection in the whole matrix does the rest.
//
// 1. Rows, or every second or fourth of them, fall into interleaved groups. A thread takes the
//    maxima of one group in the columns of one 16-byte vector.
// 2. The m-th largest of the maxima of a column is a bound that m of its entries reach.
// 3. A second read, shared out in the same way, lists the few entries that reach the bound. About
//    m s (1 + m/2G) are expected if every s-th row was looked at, in G groups. Their order depends
//    on atomic additions, what is chosen among them does not.
// 4. One warp for each column finds the m-th entry of its list.
// 5. Columns with an m too large for groups or list, or with more entries that reach the bound than
//    the list has room for (mostly one number, or sorted in an odd way), are settled as a whole. So
//    are all columns where there are few rows. A block takes 32 columns, one for each lane; its
//    warps take turns with the rows. A histogram of 8-bit digits per column, whose columns lie in
//    different banks of shared memory, gives the exact bound a digit at a time, as far as it is
//    needed. Ties are counted by ascending row. Where few of the 32 are left, the block takes these
//    one at a time.
// Nothing is decided on the host but from n, columns and the mean of m.
//
// Cost: 1 1/4 to 2 reads of x, about 2 bytes per group and column, and 8 per listed entry. Columns
// settled as a whole: 1 to 2 reads of 16-bit entries, 1 to 4 of float32, 1 to 8 of float64, and up
// to two more where ties are cut. To choose along rows is cheaper: give topk the transposed matrix
// if the encoder's product can produce it.
// Source: Feature Choice, Ayonrinde 2024 (arXiv 2411.02124).
#pragma once

#include <type_traits>

#include "cuda/feature_topk.h"
#include "cuda/row_select.cuh"

namespace fastsae::cuda {

constexpr int kGroupThreads = 256;  // of the two reads
constexpr int kBoundThreads = 128;  // one for each column
constexpr int kChooseThreads = 256;
constexpr int kColumnWarps = 8, kColumnThreads = 32 * kColumnWarps;
constexpr int kWarpDigits = 256 / kColumnWarps;  // that a warp sums up
constexpr int kFewColumns = 4;                   // of 32: a block takes them one at a time

template <class F>
struct ColumnBoundArgs {
  using Bits = typename F::Bits;
  // The upper bits of a positive number, enough for a bound.
  using Code = std::conditional_t<sizeof(Bits) == 8, uint32_t, uint16_t>;
  static constexpr int kCodeShift = F::kBits - 8 * static_cast<int>(sizeof(Code));

  const Bits* x;
  int64_t n;
  int columns;
  const int32_t* m;
  typename F::Acc* theta;
  int32_t* tie_row;

  int groups, every;  // of rows: group g has rows every (g, g + groups, g + 2 groups, ...)
  int parts;          // of the second read: part p has rows p, p + parts, ...
  int room;           // in a list; 0: there are none, all columns are settled as a whole
  Code* maxima;       // [groups, columns], 0 where no entry is positive
  Bits* bound;        // [columns] > 0, or NaN for columns that list nothing
  unsigned* count;    // [columns] entries that reach it; above `room`: settle as a whole
  Bits* values;       // [columns, room] the lists
  int32_t* rows;      // [columns, room]

  __device__ __forceinline__ bool as_a_whole(int64_t c) const {
    return room == 0 || count[c] > static_cast<unsigned>(room);
  }
};

// kWidth consecutive columns of one row: 16 bytes, or one entry.
template <class F, int kWidth>
struct Piece {
  using Bits = typename F::Bits;
  std::conditional_t<kWidth == 1, Bits, uint4> bits;

  __device__ __forceinline__ static Piece of_matrix(const Bits* p) {
    if constexpr (kWidth == 1) return {*p};
    else return {load_once(p)};
  }
  __device__ __forceinline__ static Piece of_columns(const Bits* p) {
    if constexpr (kWidth == 1) return {*p};
    else return {load_shared_by_all(p)};
  }
  __device__ __forceinline__ Bits at(int e) const {
    if constexpr (kWidth == 1) return bits;
    else return element<F>(bits, e);
  }
  __device__ __forceinline__ typename F::Acc value(int e) const { return F::widen(at(e)); }
};

// Calls use(piece, j) for rows first + j step, j = 0, 1, ..., from column c on. Behind the last row
// come zeros.
template <class F, int kWidth, class Use>
__device__ __forceinline__ void each_piece(const ColumnBoundArgs<F>& a, unsigned first,
                                           unsigned step, int64_t c, Use&& use) {
  constexpr int kUnroll = 4;  // loads in flight
  const unsigned n = static_cast<unsigned>(a.n);
  const int rows = first < n ? static_cast<int>((n - first + step - 1) / step) : 0;
  const int64_t stride = static_cast<int64_t>(step) * a.columns;
  const typename F::Bits* p = a.x + static_cast<int64_t>(first) * a.columns + c;
  for (int begin = 0; begin < rows; begin += kUnroll) {
    Piece<F, kWidth> piece[kUnroll];
    if (begin + kUnroll <= rows) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) piece[i] = Piece<F, kWidth>::of_matrix(p + i * stride);
    } else {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        piece[i] =
            begin + i < rows ? Piece<F, kWidth>::of_matrix(p + i * stride) : Piece<F, kWidth>{};
      }
    }
    p += kUnroll * stride;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) use(piece[i], begin + i);
  }
}

// A number that some of a column's reach, and how many these are.
template <class T>
struct Reached {
  T least;
  unsigned by;
};

// The largest number that at least `need` reach, where from(t) reach t, or a smaller one that
// exactly `need` do. `least` is one that enough reach, and none reaches `high`.
template <class T, class From>
__device__ __forceinline__ Reached<T> reached_by(unsigned need, Reached<T> least, T high,
                                                 From&& from) {
  while (least.by > need && high - least.least > 1) {
    const T middle = least.least + (high - least.least) / 2;
    const unsigned by = from(middle);
    if (by < need) high = middle;
    else least = {middle, by};
  }
  return least;
}

// ---- 1. the maxima of groups
// -------------------------------------------------------------------------

template <class F, int kWidth>
__global__ void __launch_bounds__(kGroupThreads, 4) group_maxima_kernel(ColumnBoundArgs<F> a) {
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  using Code = typename ColumnBoundArgs<F>::Code;
  struct alignas(kWidth * sizeof(Code)) Codes {
    Code at[kWidth];
  };
  const int64_t pieces = a.columns / kWidth, tasks = pieces * a.groups;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGroupThreads;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x; t < tasks;
       t += stride) {
    const int64_t group = t / pieces, c = (t - group * pieces) * kWidth;
    Acc largest[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) largest[e] = 0;
    each_piece<F, kWidth>(a, static_cast<unsigned>(group) * a.every,
                          static_cast<unsigned>(a.groups) * a.every, c,
                          [&](const Piece<F, kWidth>& piece, int) {
#pragma unroll
                            for (int e = 0; e < kWidth; ++e) {
                              largest[e] = max_number(piece.value(e), largest[e]);
                            }
                          });
    Codes codes;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const Bits bits = largest[e] > 0 ? F::narrow(largest[e]) : Bits(0);  // it may be -0
      codes.at[e] = static_cast<Code>(bits >> ColumnBoundArgs<F>::kCodeShift);
    }
    *reinterpret_cast<Codes*>(a.maxima + group * a.columns + c) = codes;
  }
}

// ---- 2. the bounds
// -----------------------------------------------------------------------------------

template <class F>
__global__ void __launch_bounds__(kBoundThreads) list_bound_kernel(ColumnBoundArgs<F> a) {
  using Args = ColumnBoundArgs<F>;
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  constexpr Bits kNaN = F::kInf + 1;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBoundThreads;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kBoundThreads + threadIdx.x; c < a.columns;
       c += stride) {
    const int64_t m = a.m[c];
    Bits bound = kNaN;
    unsigned count = 0;
    if (m <= 0 || m >= a.n) {
      a.theta[c] = m <= 0 ? static_cast<Acc>(__builtin_huge_val()) : Acc(0);
      a.tie_row[c] = -1;
    } else if (2 * m > a.groups || 2 * m * a.every > a.room) {
      count = static_cast<unsigned>(a.room) + 1;
    } else {
      const auto maximum = [&](int g) -> uint32_t {
        return a.maxima[static_cast<int64_t>(g) * a.columns + c];
      };
      uint32_t low = ~0u, high = 0;
#pragma unroll 16
      for (int g = 0; g < a.groups; ++g) {
        low = min(low, maximum(g));
        high = max(high, maximum(g));
      }
      const uint32_t code =
          reached_by(static_cast<unsigned>(m),
                     Reached<uint32_t>{low, static_cast<unsigned>(a.groups)}, high + 1,
                     [&](uint32_t t) {
                       unsigned by = 0;
#pragma unroll 16
                       for (int g = 0; g < a.groups; ++g) by += maximum(g) >= t;
                       return by;
                     })
              .least;
      bound = static_cast<Bits>(static_cast<Bits>(code) << Args::kCodeShift);
      if (bound == 0) bound = 1;  // all positive entries
    }
    a.bound[c] = bound;
    a.count[c] = count;
  }
}

// ---- 3. the lists
// ------------------------------------------------------------------------------------

// What a block has found: additions to lists wait for memory, so they are made together.
template <class F>
struct Found {
  static constexpr unsigned kRoom = 2048;
  typename F::Bits values[kRoom];
  int32_t rows[kRoom], columns[kRoom];
  unsigned count;
};

template <class F, int kWidth>
__global__ void __launch_bounds__(kGroupThreads, 4) list_kernel(ColumnBoundArgs<F> a) {
  using Acc = typename F::Acc;
  constexpr Acc kNaN = static_cast<Acc>(__builtin_nan(""));
  __shared__ Found<F> found;
  const unsigned tid = threadIdx.x;
  const int64_t pieces = a.columns / kWidth, tasks = pieces * a.parts;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGroupThreads;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kGroupThreads; begin < tasks;
       begin += stride) {
    if (tid == 0) found.count = 0;
    __syncthreads();  // reset before anyone finds
    const int64_t t = begin + tid, part = t / pieces, c = (t - part * pieces) * kWidth;
    Acc bound[kWidth];
    bool any_bound = false;
    if (t < tasks) {
      const Piece<F, kWidth> bounds = Piece<F, kWidth>::of_columns(a.bound + c);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        bound[e] = bounds.value(e);
        any_bound |= bound[e] == bound[e];
      }
    }
    if (any_bound) {
      const unsigned first = static_cast<unsigned>(part), step = static_cast<unsigned>(a.parts);
      each_piece<F, kWidth>(a, first, step, c, [&](const Piece<F, kWidth>& piece, int j) {
        bool any = false;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) any |= piece.value(e) >= bound[e];
        if (!any) return;
        const int32_t row = static_cast<int32_t>(first + static_cast<unsigned>(j) * step);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          if (!(piece.value(e) >= bound[e])) continue;
          const unsigned at = atomicAdd(&found.count, 1u);
          if (at < Found<F>::kRoom) {
            found.values[at] = piece.at(e);
            found.rows[at] = row;
            found.columns[at] = static_cast<int32_t>(c + e);
          } else {  // settle the column as a whole, which keeps the same
            atomicMax(&a.count[c + e], static_cast<unsigned>(a.room) + 1);
            bound[e] = kNaN;
          }
        }
      });
    }
    __syncthreads();  // all are found
    const unsigned count = min(found.count, Found<F>::kRoom);
    for (unsigned i = tid; i < count; i += kGroupThreads) {
      const int64_t column = found.columns[i];
      const unsigned at = atomicAdd(&a.count[column], 1u);
      if (at >= static_cast<unsigned>(a.room)) continue;
      a.values[column * a.room + at] = found.values[i];
      a.rows[column * a.room + at] = found.rows[i];
    }
    __syncthreads();  // listed before they are overwritten
  }
}

// ---- 4. the m-th entry of a list
// ---------------------------------------------------------------------

// One warp for each column.
template <class F>
__global__ void __launch_bounds__(kChooseThreads) choose_kernel(ColumnBoundArgs<F> a) {
  using Bits = typename F::Bits;
  using Number = std::conditional_t<sizeof(Bits) == 8, uint64_t, uint32_t>;  // orders like values
  constexpr int kWarps = kChooseThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + warp; c < a.columns;
       c += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Bits bound = a.bound[c];
    const unsigned count = a.count[c];
    if (bound > F::kInf || count > static_cast<unsigned>(a.room)) continue;
    const Bits* values = a.values + c * a.room;
    const int32_t* rows = a.rows + c * a.room;
    const auto number_of = [&](auto&& counted) {
      unsigned total = 0;
      for (unsigned first = 0; first < count; first += 32) {
        const unsigned i = first + static_cast<unsigned>(lane);
        const unsigned lanes = __ballot_sync(kFullWarp, i < count && counted(i));
        total += static_cast<unsigned>(__popc(lanes));
      }
      return total;
    };
    const unsigned m = static_cast<unsigned>(a.m[c]);
    typename F::Acc theta = F::widen(static_cast<Bits>(bound - 1));  // all that are listed
    int32_t tie_row = -1;
    if (count > m) {
      const auto last = reached_by(
          m, Reached<Number>{bound, count}, Number{F::kInf} + 1,
          [&](Number t) { return number_of([&](unsigned i) { return values[i] >= t; }); });
      const Bits least = static_cast<Bits>(last.least);
      if (last.by == m) {
        theta = F::widen(static_cast<Bits>(least - 1));
      } else {  // cut the ties: the first rows stay
        const unsigned above = number_of([&](unsigned i) { return values[i] > least; });
        const uint32_t end = static_cast<uint32_t>(a.n);
        const auto back = [&](unsigned i) { return end - static_cast<uint32_t>(rows[i]); };
        const auto kept =
            reached_by(m - above, Reached<uint32_t>{1, last.by - above}, end + 1, [&](uint32_t t) {
              return number_of([&](unsigned i) { return values[i] == least && back(i) >= t; });
            });
        theta = F::widen(least);
        tie_row = static_cast<int32_t>(end - kept.least);
      }
    }
    if (lane == 0) {
      a.theta[c] = theta;
      a.tie_row[c] = tie_row;
    }
  }
}

// ---- 5. columns as a whole
// ---------------------------------------------------------------------------

// One column, 0 < m < n, by the whole block.
template <class F>
__device__ __forceinline__ void settle_column(const ColumnBoundArgs<F>& a, int64_t c,
                                              SelectSpace& space, unsigned* sums) {
  using Bits = typename F::Bits;
  const auto positive = [&](int64_t r) {
    const Bits bits = a.x[r * a.columns + c];
    return F::widen(bits) > 0 ? bits : Bits(0);
  };
  unsigned rest;
  const Bits least = kth_key<kColumnThreads, Bits>(
      static_cast<int>(a.n), static_cast<unsigned>(a.m[c]), 0, space, positive, &rest);
  unsigned own = 0, before = 0, ties = 0;
  const int64_t part = (a.n + kColumnThreads - 1) / kColumnThreads;
  const int64_t begin = min(a.n, part * threadIdx.x), end = min(a.n, begin + part);
  if (least > 0) {
    for (int64_t r = begin; r < end; ++r) own += positive(r) == least;
    before = block_exclusive_sum<kColumnThreads>(own, sums, &ties);
  }
  if (ties > rest) {  // some are cut; one thread has the last that is kept
    if (before >= rest || rest > before + own) return;
    int64_t r = begin;
    for (unsigned left = rest - before; left > 0; ++r) left -= positive(r) == least;
    a.theta[c] = F::widen(least);
    a.tie_row[c] = static_cast<int32_t>(r - 1);
  } else if (threadIdx.x == 0) {
    a.theta[c] = least > 0 ? F::widen(static_cast<Bits>(least - 1)) : 0;
    a.tie_row[c] = -1;
  }
}

template <class F>
__global__ void __launch_bounds__(kColumnThreads, 3) column_bound_kernel(ColumnBoundArgs<F> a) {
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  constexpr Acc kInf = static_cast<Acc>(__builtin_huge_val());
  __shared__ unsigned histogram[256][32];
  __shared__ unsigned sums[kColumnWarps][32];
  __shared__ unsigned digit_of[32], need_of[32], count_of[32];
  __shared__ SelectSpace space;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;

  clear_histogram(space);
  for (int64_t first = int64_t{blockIdx.x} * 32; first < a.columns;
       first += int64_t{gridDim.x} * 32) {
    const int64_t c = first + lane;
    const bool exists = c < a.columns && a.as_a_whole(c);
    unsigned left = __ballot_sync(kFullWarp, exists);  // the same in every warp
    if (a.room > 0 && __popc(left) <= kFewColumns) {
      for (; left; left &= left - 1) {
        settle_column(a, first + __ffs(static_cast<int>(left)) - 1, space, sums[0]);
      }
      continue;
    }
    const int64_t keep = exists ? a.m[c] : 0;
    unsigned need = static_cast<unsigned>(keep < 0 ? 0 : keep);
    Bits prefix = 0, known = 0;
    bool open = need > 0;   // the bound of this column is not known yet
    bool ties_cut = false;  // not all entries equal to it are kept
    Acc theta = open ? Acc(0) : kInf;

    for (int shift = F::kBits - 8; shift >= 0; shift -= 8) {
      for (int d = warp; d < 256; d += kColumnWarps) histogram[d][lane] = 0;
      __syncthreads();  // zeroed before anyone counts
      if (open) {
        for (int64_t r = warp; r < a.n; r += kColumnWarps) {
          const Bits bits = a.x[r * a.columns + c];
          const Bits key = F::key(bits);
          if (F::widen(bits) > 0 && static_cast<Bits>(key & known) == prefix) {
            atomicAdd(&histogram[static_cast<unsigned>(key >> shift) & 255u][lane], 1u);
          }
        }
      }
      __syncthreads();  // counted before the sums
      unsigned own = 0;
      for (int d = 0; d < kWarpDigits; ++d) own += histogram[255 - kWarpDigits * warp - d][lane];
      sums[warp][lane] = own;
      __syncthreads();  // every warp's sum is there
      unsigned above = 0, total = 0;
      for (int w = 0; w < kColumnWarps; ++w) {
        if (w < warp) above += sums[w][lane];
        total += sums[w][lane];
      }
      if (open && above < need && need <= above + own) {  // one warp for each column
        int digit = 255 - kWarpDigits * warp;
        for (; need > above + histogram[digit][lane]; --digit) above += histogram[digit][lane];
        digit_of[lane] = static_cast<unsigned>(digit);
        need_of[lane] = need - above;
        count_of[lane] = histogram[digit][lane];
      }
      __syncthreads();  // found before everyone reads it
      if (open && total <= need && known == 0) {
        open = false;  // all positive entries
      } else if (open) {
        prefix = static_cast<Bits>(prefix | static_cast<Bits>(digit_of[lane]) << shift);
        known = static_cast<Bits>(known | static_cast<Bits>(Bits(255) << shift));
        need = need_of[lane];
        if (need == count_of[lane]) {  // whatever the digits to come are: all that start so
          open = false;
          theta = F::widen(F::from_key(static_cast<Bits>(prefix - 1)));
        } else if (shift == 0) {
          open = false;
          ties_cut = true;
          theta = F::widen(F::from_key(prefix));
        }
      }
      if (!__syncthreads_or(open)) break;  // and read before the next digit overwrites it
    }

    // Warps take consecutive parts of the rows; in one of them lies the last tie that is kept.
    int32_t tie_row = -1;
    bool ties_here = false;
    if (__syncthreads_or(ties_cut)) {
      const int64_t part = (a.n + kColumnWarps - 1) / kColumnWarps;
      const int64_t begin = min(a.n, part * warp), end = min(a.n, begin + part);
      unsigned own = 0;
      if (ties_cut) {
        for (int64_t r = begin; r < end; ++r) own += F::widen(a.x[r * a.columns + c]) == theta;
      }
      sums[warp][lane] = own;
      __syncthreads();  // every warp's sum is there
      unsigned before = 0;
      for (int w = 0; w < warp; ++w) before += sums[w][lane];
      ties_here = ties_cut && before < need && need <= before + own;
      if (ties_here) {
        int64_t r = begin;
        for (unsigned left = need - before; left > 0; ++r) {
          left -= F::widen(a.x[r * a.columns + c]) == theta;
        }
        tie_row = static_cast<int32_t>(r - 1);
      }
      __syncthreads();  // the sums are read before the next columns overwrite them
    }
    if (exists && (ties_cut ? ties_here : warp == 0)) {
      a.theta[c] = theta;
      a.tie_row[c] = tie_row;
    }
  }
}

}  // namespace fastsae::cuda
