// Copies into shared memory that a thread starts and waits for later (cp.async): they take no
// registers while they are under way. What has come is visible to the thread that copied it, and to
// others after a barrier.
#pragma once

#include "cuda/platform.cuh"

namespace fastsae::cuda {

// Starts to copy 8 or 16 bytes; both addresses are multiples of that.
template <int kBytes>
__device__ __forceinline__ void start_copy(void* to, const void* from) {
  static_assert(kBytes == 8 || kBytes == 16);
#ifdef FASTSAE_EMULATED
  emu::start_copy(to, from, kBytes);
#else
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" : : "r"(shared), "l"(from) : "memory");
  }
#endif
}

// Makes a group of the copies that this thread has started since the last one.
__device__ __forceinline__ void close_copies() {
#ifdef FASTSAE_EMULATED
  emu::close_copies();
#else
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits until all groups of this thread but the kUnderWay last ones are there.
template <int kUnderWay>
__device__ __forceinline__ void wait_for_copies() {
#ifdef FASTSAE_EMULATED
  emu::wait_for_copies(kUnderWay);
#else
  asm volatile("cp.async.wait_group %0;" : : "n"(kUnderWay) : "memory");
#endif
}

}  // namespace fastsae::cuda
