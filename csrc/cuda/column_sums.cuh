// Sums of the rows of a matrix, in a fixed order, and the factor that clips a gradient.
#pragma once

#include "cuda/block.cuh"

namespace fastsae::cuda {

constexpr int kColumnRows = 64;  // rows that a block of column_sums_kernel adds up
constexpr int kColumnThreads = 128;

// out[part] = sum of kColumnRows rows of x [rows, d], a thread per column.
template <class A>
__global__ void __launch_bounds__(kColumnThreads)
    column_sums_kernel(const A* __restrict__ x, int64_t rows, int d, A* __restrict__ out) {
  const int strips = (d + kColumnThreads - 1) / kColumnThreads;
  const int64_t parts = (rows + kColumnRows - 1) / kColumnRows;
  for (int64_t task = blockIdx.x; task < parts * strips; task += gridDim.x) {
    const int64_t part = task / strips, first = part * kColumnRows;
    const int c = static_cast<int>(task % strips) * kColumnThreads + static_cast<int>(threadIdx.x);
    if (c >= d) continue;
    const int count = static_cast<int>(min(int64_t{kColumnRows}, rows - first));
    A sum = 0;
#pragma unroll 8
    for (int r = 0; r < count; ++r) sum += x[(first + r) * d + c];
    out[part * d + c] = sum;
  }
}

// out = sum of the rows of x [rows, d], 32 columns a block.
template <class A>
__global__ void __launch_bounds__(1024)
    last_column_sums_kernel(const A* __restrict__ x, int64_t rows, int d, A* __restrict__ out) {
  __shared__ A sums[32][33];
  const int lane = static_cast<int>(threadIdx.x) & 31, strand = static_cast<int>(threadIdx.x) >> 5;
  for (int first = static_cast<int>(blockIdx.x) * 32; first < d;
       first += static_cast<int>(gridDim.x) * 32) {
    const int c = first + lane;
    A sum = 0;
    for (int64_t r = strand; c < d && r < rows; r += 32) sum += x[r * d + c];
    sums[strand][lane] = sum;
    __syncthreads();  // all strands are there
    if (strand == 0 && c < d) {
      sum = 0;
      for (int s = 0; s < 32; ++s) sum += sums[s][lane];
      out[c] = sum;
    }
    __syncthreads();  // read before the next columns overwrite them
  }
}

// What all gradients have to be multiplied with so that their norm is at most max_norm; those of
// clip [2], or null, have the squared norm clip[0] and are told the factor. One block.
template <class A>
__global__ void __launch_bounds__(1024)
    clip_kernel(const double* __restrict__ squares, int64_t groups, const A* __restrict__ g_b_dec,
                int d, double max_norm, double* __restrict__ clip, A* __restrict__ scale) {
  __shared__ double space[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < groups; i += 1024) sum += squares[i];
  for (int c = static_cast<int>(threadIdx.x); c < d; c += 1024) {
    sum += static_cast<double>(g_b_dec[c]) * static_cast<double>(g_b_dec[c]);
  }
  const double total = block_sum<1024>(sum, space) + (clip ? clip[0] : 0.0);
  const double factor = max_norm / (sqrt(total) + 1e-6);
  if (threadIdx.x != 0) return;
  *scale = static_cast<A>(factor < 1.0 ? factor : 1.0);
  if (clip) clip[1] = factor < 1.0 ? factor : 1.0;
}

}  // namespace fastsae::cuda
