// Bulk copies of tiles from global into shared memory (TMA) on Hopper. One thread starts a copy;
// the engine finds addresses, fills what lies outside of the matrix with zeros, and counts the
// bytes on a barrier.
#pragma once

#include "cuda/hopper_barrier.cuh"

#ifndef FASTSAE_EMULATED
#include <cuda.h>  // types only: nothing of the driver is linked
#endif

namespace fastsae::cuda {

#ifdef FASTSAE_EMULATED
using TensorMap = emu::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// A tile is `rows` rows of 128 bytes: 64 bfloat16. Their 16-byte pieces are exchanged within a row,
// piece p of row r for piece p ^ (r % 8), so that no two of a column lie in the same banks.
constexpr int kTileDepth = 64;

#ifdef FASTSAE_HOPPER
// Copies the tile whose first element is (row, column); it starts at a multiple of 1024 bytes.
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap& map, int column, int row,
                                          uint32_t barrier) {
#ifdef FASTSAE_EMULATED
  emu::copy_tile(to, map, column, row, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
#endif
}
#endif

// ---- the host's side ----

// Describes x [rows, columns] of bfloat16, row-major and contiguous, met in tiles of `tile_rows`
// rows (at most 256). Returns null, or what is wrong. Columns are a multiple of 8, and x starts at
// a multiple of 16 bytes: the engine knows no others.
#ifdef FASTSAE_EMULATED
inline const char* describe_matrix(TensorMap* map, const void* x, int64_t rows, int64_t columns,
                                   int tile_rows) {
  if (rows < 1 || columns < 1 || columns % 8 || tile_rows < 1 || tile_rows > 256 ||
      reinterpret_cast<uintptr_t>(x) % 16) {
    return "expected a matrix that cuTensorMapEncodeTiled takes, got an error";
  }
  *map = {static_cast<const unsigned char*>(x),
          rows,
          columns,
          2 * columns,
          tile_rows,
          kTileDepth,
          true};
  return nullptr;
}
#else
inline const char* describe_matrix(TensorMap* map, const void* x, int64_t rows, int64_t columns,
                                   int tile_rows) {
  static const auto encode = []() -> decltype(&cuTensorMapEncodeTiled) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &status);
    if (error != cudaSuccess || status != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!encode) return "expected a driver with cuTensorMapEncodeTiled (CUDA 12), got one without";
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {2 * static_cast<cuuint64_t>(columns)};
  const cuuint32_t box[2] = {kTileDepth, static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(x), sizes, pitch, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS
             ? nullptr
             : "expected a matrix that cuTensorMapEncodeTiled takes, got an error";
}
#endif

}  // namespace fastsae::cuda
