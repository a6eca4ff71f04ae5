// The device and stream that an operator runs on, and where its kernels register.
#pragma once

#include "check.h"
#include "torch.h"

#ifdef FASTSAE_EMULATED
#define FASTSAE_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastsae_emulated, CPU, m)
#else
#define FASTSAE_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastsae, CUDA, m)
// Lives in libtorch_cuda.so. Weak, so that a CPU-only torch can load this library too.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace fastsae::cuda {

// Makes the tensor's device current while it lives.
class DeviceScope {
#ifdef FASTSAE_EMULATED
 public:
  explicit DeviceScope(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
 public:
  explicit DeviceScope(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  void* stream() const {
    FASTSAE_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "fastsae: expected a torch with CUDA, got one without");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace fastsae::cuda
