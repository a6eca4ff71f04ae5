// The launch of the product on Hopper. Other GPUs have an empty kernel: callers ask first.
#include "cuda/hopper_product_launch.cuh"

namespace fastsae::cuda {

bool has_hopper_product() {
#ifdef FASTSAE_EMULATED
  return true;
#else
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
#endif
}

const char* launch_hopper_product(const HopperProductParams& p, void* stream) {
  const StoreSums store{p.out, p.pitch, p.n, p.columns, p.pitch % 2 == 0 && p.columns % 2 == 0};
  return launch_product_with(p, store, static_cast<cudaStream_t>(stream));
}

}  // namespace fastsae::cuda
