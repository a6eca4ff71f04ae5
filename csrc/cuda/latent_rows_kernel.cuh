// Kernels of latent_rows.h: each reads a matrix of pre-activations once, or a few of its entries.
//
// Cost: scores, one read and one write of the matrix, with effects a read of them and, to
// normalize, another one; group max, one read. No atomics.
#pragma once

#include "cuda/block.cuh"
#include "cuda/latent_rows.h"
#include "cuda/number.cuh"

namespace fastsae::cuda {

constexpr int kRowThreads = 256;

// One row of pre-activations.
template <class F>
struct LatentRow {
  using A = typename F::Acc;
  const A* x;
  const A* bias;
  const bool* mask;

  __device__ __forceinline__ LatentRow(const LatentRows& rows, int64_t r)
      : x(static_cast<const A*>(rows.x) + r * rows.m),
        bias(static_cast<const A*>(rows.bias)),
        mask(rows.mask) {}

  __device__ __forceinline__ bool masked(int j) const { return mask && !mask[j]; }
  __device__ __forceinline__ A at(int j) const { return bias ? x[j] + bias[j] : x[j]; }
};

template <class A>
__device__ __forceinline__ A magnitude(A x) {
  return x < A(0) ? -x : x;
}
// A NaN stays one.
template <class A>
__device__ __forceinline__ A positive(A x) {
  return x <= A(0) ? A(0) : x;
}

// A block per row.
template <class F, bool kEffect>
__global__ void __launch_bounds__(kRowThreads) scores_kernel(ScoreParams p) {
  using A = typename F::Acc;
  __shared__ A space[kRowThreads / 32];
  const int m = p.rows.m;
  for (int64_t r = blockIdx.x; r < p.rows.n; r += gridDim.x) {
    const LatentRow<F> row(p.rows, r);
    const A* effect = static_cast<const A*>(p.effect) + r * m;
    A* scores = static_cast<A*>(p.scores) + r * m;
    A base = 0;
    if constexpr (kEffect) {
      A mean = 1;
      if (p.normalize) {
        A sum = 0;
        for (int j = static_cast<int>(threadIdx.x); j < m; j += kRowThreads) {
          sum += magnitude(effect[j]);
        }
        mean = block_sum<kRowThreads>(sum, space) / static_cast<A>(m);
      }
      base = mean == A(0) ? A(1) : mean / static_cast<A>(p.beta);
    }
    for (int j = static_cast<int>(threadIdx.x); j < m; j += kRowThreads) {
      const A z = row.at(j);
      A score = magnitude(z);
      if constexpr (kEffect) score = positive(z) * (base + magnitude(effect[j]));
      scores[j] = row.masked(j) ? -static_cast<A>(__builtin_huge_val()) : score;
    }
    if constexpr (kEffect) __syncthreads();  // sums read before the next row's are written
  }
}

// A thread per entry.
template <class F>
__global__ void __launch_bounds__(kRowThreads) pick_kernel(PickParams p) {
  using A = typename F::Acc;
  const int64_t entries = p.rows.n * p.k, step = static_cast<int64_t>(gridDim.x) * kRowThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x; i < entries;
       i += step) {
    const LatentRow<F> row(p.rows, i / p.k);
    const int j = p.indices[i];
    A value = row.masked(j) ? A(0) : row.at(j);
    if (p.relu) value = positive(value);
    static_cast<A*>(p.values)[i] = value;
  }
}

// A warp per group of a row. Of equal keys the lowest index stays.
template <class F>
__global__ void __launch_bounds__(kRowThreads) group_max_kernel(GroupMaxParams p) {
  using A = typename F::Acc;
  using Bits = typename F::Bits;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int size = p.rows.m / p.k;
  const int64_t groups = p.rows.n * p.k;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kRowThreads / 32);
  int64_t group = static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  for (; group < groups; group += warps) {
    const LatentRow<F> row(p.rows, group / p.k);
    const int first = static_cast<int>(group % p.k) * size;
    Bits best = 0;  // below every key
    int at = first + size;
#pragma unroll 4
    for (int j = first + lane; j < first + size; j += 32) {
      const Bits key = F::key(F::narrow(row.at(j)));
      if (key > best) {
        best = key;
        at = j;
      }
    }
    for (int step = 16; step > 0; step >>= 1) {
      const Bits other = __shfl_xor_sync(kFullWarp, best, step);
      const int there = __shfl_xor_sync(kFullWarp, at, step);
      if (other > best || (other == best && there < at)) {
        best = other;
        at = there;
      }
    }
    if (lane == 0) {
      static_cast<A*>(p.values)[group] = positive(row.at(at));
      p.indices[group] = at;
    }
  }
}

}  // namespace fastsae::cuda
