// What the device code is compiled by: nvcc, or the host emulation of the tests. Everything that
// the two spell differently is here, and every instruction that has no spelling in C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef FASTSAE_EMULATED
#include "types.h"
#include "emulator.h"
#else
#include <cuda_runtime.h>
#define FASTSAE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#define FASTSAE_DYN_SMEM(T, name)                              \
  extern __shared__ __align__(16) unsigned char fastsae_raw[]; \
  T* name = reinterpret_cast<T*>(fastsae_raw)
#endif

namespace fastsae::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// 16-bit formats, rounded to nearest even.
#ifdef FASTSAE_EMULATED
inline float half_to_float(uint16_t bits) {
  return widen(fp16{bits});
}
inline uint16_t float_to_half(float x) {
  return narrow<fp16>(x).bits;
}
inline uint16_t float_to_bfloat16(float x) {
  return narrow<bf16>(x).bits;
}
#else
__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

// The larger number, or of two pairs of 16-bit numbers each. Plain: NaN loses; or_nan: it wins.
#ifdef FASTSAE_EMULATED
template <class T>
inline T max_number(T x, T y) {  // fmax of the host lets a signalling NaN win
  return x >= y || y != y ? x : y;
}
inline float max_or_nan(float x, float y) {
  return x != x || x >= y ? x : y;
}
template <class T>
inline uint32_t larger_pair(uint32_t a, uint32_t b, bool nan_wins) {
  uint32_t pair = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const T p{static_cast<uint16_t>(a >> shift)}, q{static_cast<uint16_t>(b >> shift)};
    const float x = widen(p), y = widen(q);
    const bool first = x != x ? nan_wins : y != y ? !nan_wins : x >= y;
    pair |= static_cast<uint32_t>((first ? p : q).bits) << shift;
  }
  return pair;
}
#define FASTSAE_LARGER_PAIR(name, T, nan_wins, instruction) \
  inline uint32_t name(uint32_t a, uint32_t b) {            \
    return larger_pair<T>(a, b, nan_wins);                  \
  }
#else
__device__ __forceinline__ float max_number(float x, float y) {
  return fmaxf(x, y);
}
__device__ __forceinline__ double max_number(double x, double y) {
  return fmax(x, y);
}
__device__ __forceinline__ float max_or_nan(float x, float y) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
}
#define FASTSAE_LARGER_PAIR(name, T, nan_wins, instruction)          \
  __device__ __forceinline__ uint32_t name(uint32_t a, uint32_t b) { \
    asm(instruction " %0, %0, %1;" : "+r"(a) : "r"(b));              \
    return a;                                                        \
  }
#endif
FASTSAE_LARGER_PAIR(max_float16x2, fp16, false, "max.f16x2")
FASTSAE_LARGER_PAIR(max_or_nan_float16x2, fp16, true, "max.NaN.f16x2")
FASTSAE_LARGER_PAIR(max_bfloat16x2, bf16, false, "max.bf16x2")
FASTSAE_LARGER_PAIR(max_or_nan_bfloat16x2, bf16, true, "max.NaN.bf16x2")
#undef FASTSAE_LARGER_PAIR

// Square root and quotient to 2 units in the last place: 2 instructions each instead of about 20.
#ifdef FASTSAE_EMULATED
inline float close_root(float x) {
  return std::sqrt(x);
}
inline float close_quotient(float x, float y) {
  return x / y;
}
#else
__device__ __forceinline__ float close_root(float x) {
  asm("sqrt.approx.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float close_quotient(float x, float y) {
  asm("div.approx.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
}
#endif

// 16 bytes that are read once: they should not push anything out of the caches.
__device__ __forceinline__ uint4 load_once(const void* p) {
  return __ldcs(static_cast<const uint4*>(p));
}
// 16 bytes that others read too.
__device__ __forceinline__ uint4 load_shared_by_all(const void* p) {
  return __ldg(static_cast<const uint4*>(p));
}
// 16 bytes that this block and its neighbors read again and again: the first-level cache should
// keep them, or leave its room to others.
__device__ __forceinline__ uint4 load_again(const void* p, bool keep) {
#ifdef FASTSAE_EMULATED
  (void)keep;
  return *static_cast<const uint4*>(p);
#else
  uint4 v;
  if (keep) {
    asm("ld.global.nc.L1::evict_last.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
  } else {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
  }
  return v;
#endif
}

// Starts to fetch the line at p into the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) {
#ifdef FASTSAE_EMULATED
  (void)p;
#else
  asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
#endif
}
// The same for many bytes, by a whole block; to 16 bytes.
__device__ __forceinline__ void prefetch_block(const void* p, unsigned bytes) {
#ifdef FASTSAE_EMULATED
  (void)p, (void)bytes;
#elif __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0 && bytes >= 16) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                 :
                 : "l"(reinterpret_cast<uintptr_t>(p) & ~uintptr_t{15}), "r"(bytes & ~15u));
  }
#else
  constexpr unsigned kLine = 128;
  for (unsigned at = kLine * threadIdx.x; at < bytes; at += kLine * blockDim.x) {
    prefetch(static_cast<const char*>(p) + at);
  }
#endif
}

// The same by one thread, of a row that starts at a multiple of 16 bytes and has one of them.
__device__ __forceinline__ void prefetch_row(const void* p, unsigned bytes) {
#ifdef FASTSAE_EMULATED
  (void)p, (void)bytes;
#elif __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(p), "r"(bytes));
#else
  constexpr unsigned kLine = 128;
  for (unsigned at = 0; at < bytes; at += kLine) prefetch(static_cast<const char*>(p) + at);
#endif
}

// ---- the host's side of a launch ----

// Lets a kernel be launched with `bytes` of dynamic shared memory. Without this it gets 48 KiB, and
// its static shared memory counts too.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes <= 32 * 1024) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
}

// null when the launches since the last call went well, else the CUDA error's text.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice) {
    return "expected a GPU that the kernels were built for (compute capability 8.x, 9.0, 10.x and "
           "from 12.0 on, unless FASTSAE_CUDA_ARCHS said otherwise), got another";
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}

// Bytes of shared memory that the current device has.
struct SharedMemory {
  int block, multiprocessor;  // a block can have, a multiprocessor has
};
inline SharedMemory shared_memory() {
  int device = 0;
  SharedMemory found{};
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&found.multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                             device) != cudaSuccess) {
    return {};
  }
  return found;
}

// Kernels stride over what is more. Few in the emulation, so that they do.
#ifdef FASTSAE_EMULATED
constexpr int64_t kMostBlocks = 5;
#else
constexpr int64_t kMostBlocks = int64_t{1} << 30;
#endif

inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

}  // namespace fastsae::cuda
