// Stage 5 of the column bounds: columns that are settled as a whole.
#pragma once

#include "cuda/feature_topk_args.cuh"
#include "cuda/row_select.cuh"

namespace fastsae::cuda {

constexpr int kColumnWarps = 8, kColumnThreads = 32 * kColumnWarps;
constexpr int kWarpDigits = 256 / kColumnWarps;  // that a warp sums up
constexpr int kFewColumns = 4;                   // of 32: a block takes them one at a time

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
    a.lower_bound[c] = F::widen(least);
    a.tie_row[c] = static_cast<int32_t>(r - 1);
  } else if (threadIdx.x == 0) {
    a.lower_bound[c] = least > 0 ? F::widen(static_cast<Bits>(least - 1)) : 0;
    a.tie_row[c] = -1;
  }
}

// A block takes 32 columns, one for each lane; those with lists that are of use are skipped.
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
    const bool exists = c < a.columns && a.is_whole(c);
    unsigned left = __ballot_sync(kFullWarp, exists);  // the same in every warp
    if (a.list_capacity > 0 && __popc(left) <= kFewColumns) {
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
    Acc lower_bound = open ? Acc(0) : kInf;

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
          lower_bound = F::widen(F::from_key(static_cast<Bits>(prefix - 1)));
        } else if (shift == 0) {
          open = false;
          ties_cut = true;
          lower_bound = F::widen(F::from_key(prefix));
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
        for (int64_t r = begin; r < end; ++r)
          own += F::widen(a.x[r * a.columns + c]) == lower_bound;
      }
      sums[warp][lane] = own;
      __syncthreads();  // every warp's sum is there
      unsigned before = 0;
      for (int w = 0; w < warp; ++w) before += sums[w][lane];
      ties_here = ties_cut && before < need && need <= before + own;
      if (ties_here) {
        int64_t r = begin;
        for (unsigned left = need - before; left > 0; ++r) {
          left -= F::widen(a.x[r * a.columns + c]) == lower_bound;
        }
        tie_row = static_cast<int32_t>(r - 1);
      }
      __syncthreads();  // the sums are read before the next columns overwrite them
    }
    if (exists && (ties_cut ? ties_here : warp == 0)) {
      a.lower_bound[c] = lower_bound;
      a.tie_row[c] = tie_row;
    }
  }
}

}  // namespace fastsae::cuda
