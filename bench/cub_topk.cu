// The k largest of many numbers and where they are, by CUB (CCCL 3.3 or later): what bench/cub.py
// compiles and loads. The result is in no order, and among ties any are taken.
#include <cuda_bf16.h>

#include <cstdint>

#include <cub/device/device_topk.cuh>
#include <cuda/iterator>

namespace {

template <class T>
int largest(void* space, size_t* bytes, const void* x, int64_t n, int64_t k, void* values,
            int32_t* places, cudaStream_t stream) {
  namespace execution = cuda::execution;
  const auto any = execution::require(execution::determinism::not_guaranteed,
                                      execution::output_ordering::unsorted);
  const cuda::std::execution::env how{cuda::stream_ref{stream}, any};
  return cub::DeviceTopK::MaxPairs(space, *bytes, static_cast<const T*>(x), static_cast<T*>(values),
                                   cuda::counting_iterator<int32_t>{0}, places, n, k, how);
}

}  // namespace

// `space` null: only finds how many `bytes` of it are needed. Returns a cudaError_t.
extern "C" int cub_topk(int bfloat16, void* space, size_t* bytes, const void* x, int64_t n,
                        int64_t k, void* values, int32_t* places, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (bfloat16) return largest<__nv_bfloat16>(space, bytes, x, n, k, values, places, on);
  return largest<float>(space, bytes, x, n, k, values, places, on);
}
