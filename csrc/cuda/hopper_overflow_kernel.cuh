// Rows with more candidates than their list has room for: they are found, their inputs are gathered
// for a product of their own, and they are selected from all of it. Rows in random order have none;
// the launches are the same, and end at once.
#pragma once

#include "cuda/row_candidates_kernel.cuh"

namespace fastsae::cuda {

constexpr int kOverflowThreads = 256;

struct Overflows {
  uint32_t* found;  // how many; zero at first
  int32_t* rows;    // [n], in any order
};

// Also cuts the counts to what the lists hold.
__global__ void __launch_bounds__(kOverflowThreads)
    find_overflows_kernel(RowCandidates kept, int n, Overflows to) {
  for (int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; r < n;
       r += int64_t{gridDim.x} * blockDim.x) {
    if (kept.count[r] <= static_cast<unsigned>(kept.capacity)) continue;
    kept.count[r] = static_cast<unsigned>(kept.capacity);
    to.rows[atomicAdd(to.found, 1u)] = static_cast<int32_t>(r);
  }
}

// to[i] = x[rows[i]], rows of `pieces` times 16 bytes.
__global__ void __launch_bounds__(kOverflowThreads)
    gather_overflows_kernel(const uint4* x, int pieces, Overflows from, uint4* to) {
  const unsigned found = *from.found;
  for (unsigned i = blockIdx.x; i < found; i += gridDim.x) {
    const uint4* row = x + int64_t{from.rows[i]} * pieces;
#pragma unroll 1
    for (int p = static_cast<int>(threadIdx.x); p < pieces; p += kOverflowThreads) {
      to[int64_t{i} * pieces + p] = row[p];
    }
  }
}

struct SelectOverflowsArgs {
  const uint32_t* sums;  // [rows, pitch]: of the rows found from `before` on
  int64_t pitch;
  unsigned before, rows;
  const float* bias;
  const bool* mask;
  int m, k;
  bool relu, absolute;
  Overflows from;
  float* values;
  int32_t* indices;
};

__global__ void __launch_bounds__(kOverflowThreads)
    select_overflows_kernel(const SelectOverflowsArgs a) {
  __shared__ SelectSpace space;
  __shared__ unsigned warp_counts[2 * kOverflowThreads / 32];
  const unsigned found = *a.from.found, left = found > a.before ? found - a.before : 0;
  clear_histogram(space);
  for (unsigned i = blockIdx.x; i < min(left, a.rows); i += gridDim.x) {
    const BlockRow row{{a.sums + i * a.pitch, a.bias, nullptr}, a.mask, a.absolute};
    const int64_t to = int64_t{a.from.rows[a.before + i]} * a.k;
    radix_select<kOverflowThreads>(
        row, 0, a.m, static_cast<unsigned>(a.k), space, warp_counts, [&](int place, int j) {
          const uint32_t key = Float32::key(row.at(j));
          float value = value_of(row_candidate(key, j, row.is_negative(j)));
          if ((a.mask && !a.mask[j]) || (a.relu && value <= 0)) value = 0;
          a.values[to + place] = value;
          a.indices[to + place] = j;
        });
    __syncthreads();  // done with shared memory before the next row
  }
}

}  // namespace fastsae::cuda
