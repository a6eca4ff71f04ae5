// The subset of CUDA C++ that the kernels use, executed on the host, for tests only.
// cuda/platform.cuh includes it instead of <cuda_runtime.h> when FASTSAE_EMULATED is defined.
// A CUDA thread is a fiber; the fibers of a block run on one OS thread; blocks are spread over OS
// threads. Shared memory is thread-local. Warp divergence is not modelled.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static thread_local  // one block at a time on an OS thread

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#define EMU_VEC2(N, T)              \
  struct alignas(2 * sizeof(T)) N { \
    T x, y;                         \
  }
#define EMU_VEC4(N, T)   \
  struct alignas(16) N { \
    T x, y, z, w;        \
  }
EMU_VEC2(float2, float);
EMU_VEC2(int2, int);
EMU_VEC2(uint2, unsigned);
EMU_VEC4(float4, float);
EMU_VEC4(int4, int);
EMU_VEC4(uint4, unsigned);
inline float4 make_float4(float a, float b, float c, float d) {
  return {a, b, c, d};
}
inline float2 make_float2(float a, float b) {
  return {a, b};
}
inline int2 make_int2(int a, int b) {
  return {a, b};
}
inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) {
  return {a, b, c, d};
}

// ---- bfloat16 ----
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t u = static_cast<uint32_t>(h.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {  // round to nearest even
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  u += 0x7fffu + ((u >> 16) & 1u);
  return {static_cast<uint16_t>(u >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  return __float2bfloat16(f);
}
inline float2 __bfloat1622float2(__nv_bfloat162 h) {
  return {__bfloat162float(h.x), __bfloat162float(h.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16(a), __float2bfloat16(b)};
}

namespace emu {
struct Fiber {
  uint3 tid;
  unsigned linear, lane, warp;
};
struct State {
  Fiber* cur = nullptr;
  uint3 bid{};
  dim3 bdim, gdim;
  unsigned char* dyn_smem = nullptr;
  size_t dyn_smem_bytes = 0;
};
extern thread_local State tl;

void syncthreads(const char* file, int line);
int syncthreads_count(int pred, const char* file, int line);
// Every lane named in mask deposits v; returns the 32 deposited values (those of lanes outside mask
// are poison). Of the warp intrinsics only __syncwarp orders memory.
const uint64_t* exchange(uint32_t mask, uint64_t v, const char* file, int line,
                         bool orders_memory = false);
uint32_t live_mask();
using Body = void (*)(void*);
void launch_impl(const char* name, dim3 grid, dim3 block, size_t smem, Body body, void* ctx);
// Copies of a thread into dynamic shared memory that it waits for by groups (cp.async). Some come
// at once and others when they are waited for: until then what is there is no number.
void start_copy(void* to, const void* from, int bytes);
void close_copies();
void wait_for_copies(int under_way);
void set_max_dynamic_smem(const void* fn, int bytes);
size_t max_dynamic_smem(const void* fn);

template <class... P, class... A>
void launch(const char* name, void (*fn)(P...), dim3 grid, dim3 block, size_t smem, A&&... args) {
  const void* id = reinterpret_cast<const void*>(fn);
  if (smem > max_dynamic_smem(id)) smem = static_cast<size_t>(-1);  // rejected, as the driver would
  struct Call {
    void (*fn)(P...);
    std::tuple<P...>
        args;  // converted to the parameters' types once; each thread gets its own copy
  } call{fn, std::tuple<P...>(std::forward<A>(args)...)};
  launch_impl(
      name, grid, block, smem,
      [](void* c) { std::apply(static_cast<Call*>(c)->fn, static_cast<Call*>(c)->args); }, &call);
}

// A stream that was made: what it gets runs as late as events allow, where whatever was to wait for
// it and does not is seen to. The default stream (null) runs everything at once.
class Stream {
 public:
  void add(std::function<void()> work) { waiting_.push_back(std::move(work)); }
  size_t size() const { return done_ + waiting_.size(); }  // all that it got
  void run(size_t until);

 private:
  std::deque<std::function<void()>> waiting_;
  size_t done_ = 0;
};
struct Event {
  Stream* stream = nullptr;  // null: nothing to wait for
  size_t until = 0;
};

template <class... P, class... A>
void launch_on(void* stream, const char* name, void (*fn)(P...), dim3 grid, dim3 block, size_t smem,
               A&&... args) {
  if (!stream) return launch(name, fn, grid, block, smem, std::forward<A>(args)...);
  static_cast<Stream*>(stream)->add([=, kept = std::tuple<P...>(std::forward<A>(args)...)] {
    std::apply([&](const P&... a) { launch(name, fn, grid, block, smem, a...); }, kept);
  });
}

template <class T>
uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t u = 0;
  std::memcpy(&u, &v, sizeof(T));
  return u;
}
template <class T>
T unpack(uint64_t u) {
  T v;
  std::memcpy(&v, &u, sizeof(T));
  return v;
}
template <class T>
T shfl(uint32_t mask, T v, int src, int, const char* f, int l, int width) {
  const unsigned lane = tl.cur->lane;
  const uint64_t* s = exchange(mask, pack(v), f, l);
  const unsigned base = lane & ~(static_cast<unsigned>(width) - 1);
  return unpack<T>(s[base + (static_cast<unsigned>(src) & (static_cast<unsigned>(width) - 1))]);
}
enum { kUp, kDown, kXor };
template <class T>
T shfl_rel(uint32_t mask, T v, int delta, int mode, const char* f, int l, int width) {
  const int lane = static_cast<int>(tl.cur->lane), w = width, base = lane & ~(w - 1);
  const uint64_t* s = exchange(mask, pack(v), f, l);
  int src = mode == kUp ? lane - delta : mode == kDown ? lane + delta : lane ^ delta;
  if (mode == kUp ? src < base : src >= base + w) src = lane;
  return unpack<T>(s[src]);
}
template <class T, class Op>
T reduce(uint32_t mask, T v, Op op, const char* f, int l) {
  const uint64_t* s = exchange(mask, pack(v), f, l);
  bool first = true;
  T r{};
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1u) {
      r = first ? unpack<T>(s[i]) : op(r, unpack<T>(s[i]));
      first = false;
    }
  return r;
}
template <class T>
uint32_t match_any(uint32_t mask, T v, const char* f, int l) {
  const uint64_t me = pack(v);
  const uint64_t* s = exchange(mask, me, f, l);
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1u) && s[i] == me) r |= 1u << i;
  return r;
}
inline uint32_t ballot(uint32_t mask, bool p, const char* f, int l) {
  const uint64_t* s = exchange(mask, p, f, l);
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1u) && s[i]) r |= 1u << i;
  return r;
}
// Atomics: relaxed, like CUDA's default.
template <class T, class Op>
T rmw(T* p, Op op) {
  using U = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(U));
  U* q = reinterpret_cast<U*>(p);
  U old = __atomic_load_n(q, __ATOMIC_RELAXED);
  for (;;) {
    T t;
    std::memcpy(&t, &old, sizeof(T));
    const T n = op(t);
    U nu;
    std::memcpy(&nu, &n, sizeof(T));
    if (__atomic_compare_exchange_n(q, &old, nu, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return t;
  }
}
}  // namespace emu

#define threadIdx (::emu::tl.cur->tid)
#define blockIdx (::emu::tl.bid)
#define blockDim (::emu::tl.bdim)
#define gridDim (::emu::tl.gdim)
constexpr int warpSize = 32;

#define EMU_AT __FILE__, __LINE__
#define __syncthreads() ::emu::syncthreads(EMU_AT)
#define __syncthreads_count(p) ::emu::syncthreads_count((p), EMU_AT)
#define __syncthreads_or(p) (::emu::syncthreads_count((p) != 0, EMU_AT) != 0)
#define EMU_SYNCWARP_1(m) (void)::emu::exchange((m), 0, EMU_AT, true)
#define __syncwarp(...) EMU_SYNCWARP_1((0xffffffffu __VA_OPT__(&(__VA_ARGS__))))
#define __shfl_sync(m, v, s, ...) \
  ::emu::shfl((m), (v), (s), 0, EMU_AT, 32 __VA_OPT__(+(__VA_ARGS__) - 32))
#define __shfl_up_sync(m, v, d, ...) \
  ::emu::shfl_rel((m), (v), (d), ::emu::kUp, EMU_AT, 32 __VA_OPT__(+(__VA_ARGS__) - 32))
#define __shfl_down_sync(m, v, d, ...) \
  ::emu::shfl_rel((m), (v), (d), ::emu::kDown, EMU_AT, 32 __VA_OPT__(+(__VA_ARGS__) - 32))
#define __shfl_xor_sync(m, v, d, ...) \
  ::emu::shfl_rel((m), (v), (d), ::emu::kXor, EMU_AT, 32 __VA_OPT__(+(__VA_ARGS__) - 32))
#define __ballot_sync(m, p) ::emu::ballot((m), (p), EMU_AT)
#define __any_sync(m, p) (::emu::ballot((m), (p), EMU_AT) != 0)
#define __all_sync(m, p) (::emu::ballot((m), !(p), EMU_AT) == 0)
#define __match_any_sync(m, v) ::emu::match_any((m), (v), EMU_AT)
#define __reduce_add_sync(m, v) \
  ::emu::reduce((m), (v), [](auto a, auto b) { return a + b; }, EMU_AT)
#define __reduce_max_sync(m, v) \
  ::emu::reduce((m), (v), [](auto a, auto b) { return a > b ? a : b; }, EMU_AT)
#define __reduce_min_sync(m, v) \
  ::emu::reduce((m), (v), [](auto a, auto b) { return a < b ? a : b; }, EMU_AT)
#define __reduce_or_sync(m, v) ::emu::reduce((m), (v), [](auto a, auto b) { return a | b; }, EMU_AT)

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return emu::rmw(p, [=](T o) { return static_cast<T>(o + v); });
}
template <class T>
T atomicSub(T* p, std::type_identity_t<T> v) {
  return emu::rmw(p, [=](T o) { return static_cast<T>(o - v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return emu::rmw(p, [=](T o) { return o > v ? o : v; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return emu::rmw(p, [=](T o) { return o < v ? o : v; });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return emu::rmw(p, [=](T o) { return o | v; });
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v) {
  return emu::rmw(p, [=](T o) { return o & v; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return emu::rmw(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> c, std::type_identity_t<T> v) {
  return emu::rmw(p, [=](T o) { return o == c ? v : o; });
}
inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block() {}

inline int __popc(unsigned v) {
  return __builtin_popcount(v);
}
inline int __popcll(unsigned long long v) {
  return __builtin_popcountll(v);
}
inline int __ffs(int v) {
  return __builtin_ffs(v);
}
inline int __clz(int v) {
  return v ? __builtin_clz(static_cast<unsigned>(v)) : 32;
}
inline unsigned __float_as_uint(float f) {
  return emu::unpack<unsigned>(emu::pack(f));
}
inline float __uint_as_float(unsigned u) {
  return emu::unpack<float>(emu::pack(u));
}
inline int __float_as_int(float f) {
  return emu::unpack<int>(emu::pack(f));
}
inline float __int_as_float(int u) {
  return emu::unpack<float>(emu::pack(u));
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
using std::max;
using std::min;

// ---- the few runtime calls a launcher makes ----
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
constexpr int kEmulatedShared = 227 * 1024;  // of a block, as on Hopper
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Few multiprocessors, so that small inputs meet grids that are smaller than their work.
  if (attribute == cudaDevAttrMultiProcessorCount) *value = 2;
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = kEmulatedShared;
  if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor) *value = kEmulatedShared + 1024;
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "emulated";
}
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t stream = nullptr) {
  if (stream) static_cast<emu::Stream*>(stream)->add([=] { std::memset(p, v, n); });
  else std::memset(p, v, n);
  return cudaSuccess;
}

// Streams and events. Nothing is ever captured.
using cudaEvent_t = emu::Event*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                            unsigned long long*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = new emu::Stream;
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new emu::Event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  auto* of = static_cast<emu::Stream*>(stream);
  *event = {of, of ? of->size() : 0};
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
  if (event->stream) event->stream->run(event->until);
  return cudaSuccess;
}
template <class K>
cudaError_t cudaFuncSetAttribute(K* fn, cudaFuncAttribute, int v) {
  if (v > kEmulatedShared) return cudaErrorInvalidValue;
  emu::set_max_dynamic_smem(reinterpret_cast<const void*>(fn), v);
  return cudaSuccess;
}

#define FASTSAE_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::emu::launch_on((stream), #kernel, &kernel, (grid), (block), (smem)__VA_OPT__(, ) __VA_ARGS__)
#define FASTSAE_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(::emu::tl.dyn_smem)
