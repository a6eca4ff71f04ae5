// Barriers in shared memory (mbarrier) of Hopper: they count arrivals of threads and bytes that
// copies bring. FASTSAE_HOPPER: defined where code for sm_90a alone is compiled.
#pragma once

#include "cuda/platform.cuh"

#if defined(FASTSAE_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTSAE_HOPPER 1
#endif

#ifdef FASTSAE_EMULATED
#include "hopper.h"
#endif

#ifdef FASTSAE_HOPPER
namespace fastsae::cuda {

// The number that PTX knows a place in shared memory by.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
#ifdef FASTSAE_EMULATED
  return emu::shared_address(p);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// By one thread, which then calls show_to_async_units() before a barrier of the block.
__device__ __forceinline__ void init_barrier(uint32_t barrier, unsigned arrivals) {
#ifdef FASTSAE_EMULATED
  emu::barrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(barrier), "r"(arrivals)
               : "memory");
#endif
}

// Orders what this thread has written to shared memory before what copy engine and tensor cores do
// after the next barrier: they do not see it otherwise.
__device__ __forceinline__ void show_to_async_units() {
#ifdef FASTSAE_EMULATED
  emu::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
#ifdef FASTSAE_EMULATED
  emu::barrier_arrive(barrier);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
#endif
}

// Arrives, and the phase lasts until that many more bytes have come.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, unsigned bytes) {
#ifdef FASTSAE_EMULATED
  emu::barrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(barrier), "r"(bytes)
               : "memory");
#endif
}

// Waits for the end of the phase of that parity, and sees what was done before its arrivals. The
// first phase is even; before it, an odd one counts as over.
__device__ __forceinline__ void wait_phase(uint32_t barrier, unsigned parity) {
#ifdef FASTSAE_EMULATED
  emu::barrier_wait(barrier, parity);
#else
  unsigned over;
  do {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!over);
#endif
}

}  // namespace fastsae::cuda
#endif
