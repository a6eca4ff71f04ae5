// Stages 1 to 4 of the column bounds: the few entries of each column that reach a first bound are
// listed, and the exact bound is found among them.
#pragma once

#include "cuda/block.cuh"
#include "cuda/feature_topk_args.cuh"

namespace fastsae::cuda {

constexpr int kGroupThreads = 256;  // of the two reads
constexpr int kBoundThreads = 128;  // one for each column
constexpr int kChooseThreads = 256;

// Calls use(piece, j) for rows first + j step, j = 0, 1, ..., from column c on. After the last row
// come zeros.
template <class F, bool kWide, class Use>
__device__ __forceinline__ void each_piece(const ColumnBoundArgs<F>& a, unsigned first,
                                           unsigned step, int64_t c, Use&& use) {
  using P = Pack<F, kWide>;
  constexpr int kUnroll = 4;  // loads in flight
  const unsigned n = static_cast<unsigned>(a.n);
  const int rows = first < n ? static_cast<int>((n - first + step - 1) / step) : 0;
  const int64_t stride = static_cast<int64_t>(step) * a.columns;
  const typename F::Bits* p = a.x + static_cast<int64_t>(first) * a.columns + c;
  for (int begin = 0; begin < rows; begin += kUnroll) {
    typename P::Raw piece[kUnroll];
    if (begin + kUnroll <= rows) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) piece[i] = P::load_stream(p + i * stride);
    } else {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        piece[i] = begin + i < rows ? P::load_stream(p + i * stride) : typename P::Raw{};
      }
    }
    p += kUnroll * stride;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) use(piece[i], begin + i);
  }
}

// A number, and how many numbers of a column reach it.
template <class T>
struct Reached {
  T least;
  unsigned by;
};

// The largest number that at least `need` reach, where from(t) reach t, or a smaller one that
// exactly `need` do. `least` is one that enough reach, and none reaches `high`.
template <class T, class From>
__device__ __forceinline__ Reached<T> bisect(unsigned need, Reached<T> least, T high, From&& from) {
  while (least.by > need && high - least.least > 1) {
    const T middle = least.least + (high - least.least) / 2;
    const unsigned by = from(middle);
    if (by < need) high = middle;
    else least = {middle, by};
  }
  return least;
}

// ---- 1. the maxima of groups ----

// A task is one group in the columns of one pack.
template <class F, bool kWide>
__global__ void __launch_bounds__(kGroupThreads, 4) group_maxima_kernel(ColumnBoundArgs<F> a) {
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  using Code = typename ColumnBoundArgs<F>::Code;
  using P = Pack<F, kWide>;
  constexpr int E = P::kSize;
  struct alignas(E * sizeof(Code)) Codes {
    Code at[E];
  };
  const int64_t pieces = a.columns / E, tasks = pieces * a.groups;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGroupThreads;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x; t < tasks;
       t += stride) {
    const int64_t group = t / pieces, c = (t - group * pieces) * E;
    Acc largest[E];
#pragma unroll
    for (int e = 0; e < E; ++e) largest[e] = 0;
    each_piece<F, kWide>(a, static_cast<unsigned>(group) * a.row_step,
                         static_cast<unsigned>(a.groups) * a.row_step, c,
                         [&](const typename Pack<F, kWide>::Raw& piece, int) {
#pragma unroll
                           for (int e = 0; e < E; ++e) {
                             largest[e] = max_number(P::at(piece, e), largest[e]);
                           }
                         });
    Codes codes;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const Bits bits = largest[e] > 0 ? F::narrow(largest[e]) : Bits(0);  // it may be -0
      codes.at[e] = static_cast<Code>(bits >> ColumnBoundArgs<F>::kCodeShift);
    }
    *reinterpret_cast<Codes*>(a.maxima + group * a.columns + c) = codes;
  }
}

// ---- 2. the bounds ----

// One thread for each column.
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
      a.lower_bound[c] = m <= 0 ? static_cast<Acc>(__builtin_huge_val()) : Acc(0);
      a.tie_row[c] = -1;
    } else if (2 * m > a.groups || 2 * m * a.row_step > a.list_capacity) {
      count = static_cast<unsigned>(a.list_capacity) + 1;
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
          bisect(static_cast<unsigned>(m), Reached<uint32_t>{low, static_cast<unsigned>(a.groups)},
                 high + 1,
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
    a.list_bound[c] = bound;
    a.list_count[c] = count;
  }
}

// ---- 3. the lists ----

// What a block has found: additions to lists wait for memory, so they are made together.
template <class F>
struct FoundEntries {
  static constexpr unsigned kCapacity = 2048;
  typename F::Bits values[kCapacity];
  int32_t rows[kCapacity], columns[kCapacity];
  unsigned count;
};

// A task is one part of the rows in the columns of one pack.
template <class F, bool kWide>
__global__ void __launch_bounds__(kGroupThreads, 4) list_kernel(ColumnBoundArgs<F> a) {
  using Acc = typename F::Acc;
  using P = Pack<F, kWide>;
  constexpr int E = P::kSize;
  constexpr Acc kNaN = static_cast<Acc>(__builtin_nan(""));
  __shared__ FoundEntries<F> found;
  const unsigned tid = threadIdx.x;
  const int64_t pieces = a.columns / E, tasks = pieces * a.parts;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGroupThreads;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kGroupThreads; begin < tasks;
       begin += stride) {
    if (tid == 0) found.count = 0;
    __syncthreads();  // reset before anyone finds
    const int64_t t = begin + tid, part = t / pieces, c = (t - part * pieces) * E;
    Acc bound[E];
    bool any_bound = false;
    if (t < tasks) {
      const typename P::Raw bounds = P::load(a.list_bound + c);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        bound[e] = P::at(bounds, e);
        any_bound |= bound[e] == bound[e];
      }
    }
    if (any_bound) {
      const unsigned first = static_cast<unsigned>(part), step = static_cast<unsigned>(a.parts);
      each_piece<F, kWide>(
          a, first, step, c, [&](const typename Pack<F, kWide>::Raw& piece, int j) {
            bool any = false;
#pragma unroll
            for (int e = 0; e < E; ++e) any |= P::at(piece, e) >= bound[e];
            if (!any) return;
            const int32_t row = static_cast<int32_t>(first + static_cast<unsigned>(j) * step);
#pragma unroll
            for (int e = 0; e < E; ++e) {
              if (!(P::at(piece, e) >= bound[e])) continue;
              const unsigned at = atomicAdd(&found.count, 1u);
              if (at < FoundEntries<F>::kCapacity) {
                found.values[at] = P::bits(piece, e);
                found.rows[at] = row;
                found.columns[at] = static_cast<int32_t>(c + e);
              } else {  // settle the column as a whole, which keeps the same
                atomicMax(&a.list_count[c + e], static_cast<unsigned>(a.list_capacity) + 1);
                bound[e] = kNaN;
              }
            }
          });
    }
    __syncthreads();  // all are found
    const unsigned count = min(found.count, FoundEntries<F>::kCapacity);
    for (unsigned i = tid; i < count; i += kGroupThreads) {
      const int64_t column = found.columns[i];
      const unsigned at = atomicAdd(&a.list_count[column], 1u);
      if (at >= static_cast<unsigned>(a.list_capacity)) continue;
      a.list_values[column * a.list_capacity + at] = found.values[i];
      a.list_rows[column * a.list_capacity + at] = found.rows[i];
    }
    __syncthreads();  // listed before they are overwritten
  }
}

// ---- 4. the m-th entry of a list ----

// One warp for each column.
template <class F>
__global__ void __launch_bounds__(kChooseThreads) choose_kernel(ColumnBoundArgs<F> a) {
  using Bits = typename F::Bits;
  using Number = std::conditional_t<sizeof(Bits) == 8, uint64_t, uint32_t>;  // orders like values
  constexpr int kWarps = kChooseThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + warp; c < a.columns;
       c += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Bits bound = a.list_bound[c];
    const unsigned count = a.list_count[c];
    if (bound > F::kInf || count > static_cast<unsigned>(a.list_capacity)) continue;
    const Bits* values = a.list_values + c * a.list_capacity;
    const int32_t* rows = a.list_rows + c * a.list_capacity;
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
    typename F::Acc lower_bound = F::widen(static_cast<Bits>(bound - 1));  // all that are listed
    int32_t tie_row = -1;
    if (count > m) {
      const auto last =
          bisect(m, Reached<Number>{bound, count}, Number{F::kInf} + 1,
                 [&](Number t) { return number_of([&](unsigned i) { return values[i] >= t; }); });
      const Bits least = static_cast<Bits>(last.least);
      if (last.by == m) {
        lower_bound = F::widen(static_cast<Bits>(least - 1));
      } else {  // cut the ties: the first rows stay
        const unsigned above = number_of([&](unsigned i) { return values[i] > least; });
        const uint32_t end = static_cast<uint32_t>(a.n);
        const auto back = [&](unsigned i) { return end - static_cast<uint32_t>(rows[i]); };
        const auto kept =
            bisect(m - above, Reached<uint32_t>{1, last.by - above}, end + 1, [&](uint32_t t) {
              return number_of([&](unsigned i) { return values[i] == least && back(i) >= t; });
            });
        lower_bound = F::widen(least);
        tie_row = static_cast<int32_t>(end - kept.least);
      }
    }
    if (lane == 0) {
      a.lower_bound[c] = lower_bound;
      a.tie_row[c] = tie_row;
    }
  }
}

}  // namespace fastsae::cuda
