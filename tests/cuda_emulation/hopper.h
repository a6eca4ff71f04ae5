// What a Hopper multiprocessor does beside its threads, for csrc/cuda/hopper_*.cuh: barriers in
// shared memory that count arrivals and bytes, bulk copies of tiles, and products of warpgroups.
//
// Shared memory has numeric addresses, as in PTX. Where the hardware may do a thing early or late,
// the emulation does some early and some as late as can be, so that code which does not wait gets
// wrong numbers; what the hardware leaves undefined is an error.
#pragma once

#include <cstdint>

namespace emu {

// A matrix in global memory, as the copy engine is told of it: 2-byte elements, row-major.
struct TensorMap {
  const unsigned char* base;
  int64_t rows, columns, pitch;  // pitch: bytes from row to row
  int box_rows, box_columns;
  bool swizzled;  // 16-byte pieces are exchanged within 128-byte rows; else they stay
};

uint32_t shared_address(const void* pointer);  // of dynamic shared memory

// An mbarrier: a phase is over when all have arrived and all bytes that were expected are there.
void barrier_init(uint32_t barrier, unsigned arrivals);
void barrier_arrive(uint32_t barrier, unsigned bytes_expected = 0);
// Returns once the phase of that parity is over. Parity 1 of a new barrier counts as over.
void barrier_wait(uint32_t barrier, unsigned parity);

// Shows the copy engine and the tensor cores what threads have written to shared memory.
void fence_proxy_async();

// Copies the box whose first element is (row, column); what lies outside of the matrix is zero.
void copy_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier);

// sum [64, columns] (+)= A [64, 16] B [columns, 16]^T of bfloat16, by the calling warpgroup. `sum`
// is this thread's part of the accumulators, and NaN until it has waited.
void wgmma(float* sum, int columns, uint64_t a, uint64_t b, bool add);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int most_pending);

// setmaxnreg.
void set_registers(int count);

}  // namespace emu
