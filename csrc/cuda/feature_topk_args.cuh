// For each column of x [n, columns], what its m largest positive entries are above: a lower bound,
// and the last row that is kept of those equal to it. The selection in the whole matrix does the
// rest.
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
// if the encoder's GEMM can produce it.
// Source: Feature Choice, Ayonrinde 2024 (arXiv 2411.02124).
#pragma once

#include <type_traits>

#include "cuda/feature_topk.h"
#include "cuda/pack.cuh"

namespace fastsae::cuda {

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
  typename F::Acc* lower_bound;
  int32_t* tie_row;

  int groups, row_step;  // group g has rows row_step (g, g + groups, g + 2 groups, ...)
  int parts;             // of the second read: part p has rows p, p + parts, ...
  int list_capacity;     // of a list; 0: there are none, all columns are settled as a whole
  Code* maxima;          // [groups, columns], 0 where no entry is positive
  Bits* list_bound;      // [columns] > 0, or NaN for columns that list nothing
  unsigned* list_count;  // [columns] entries that reach it; above list_capacity: settle as a whole
  Bits* list_values;     // [columns, list_capacity]
  int32_t* list_rows;    // [columns, list_capacity]

  __device__ __forceinline__ bool is_whole(int64_t c) const {
    return list_capacity == 0 || list_count[c] > static_cast<unsigned>(list_capacity);
  }
};

}  // namespace fastsae::cuda
