// What the CUDA operators have in common: device and stream, formats, scratch, registration.
#pragma once

#include "check.h"
#include "cuda/format.h"
#include "dispatch.h"
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

inline Format format_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Format::kFloat32;
    case ScalarType::Double:
      return Format::kFloat64;
    case ScalarType::BFloat16:
      return Format::kBFloat16;
    case ScalarType::Half:
      return Format::kFloat16;
    default:
      FASTSAE_CHECK(false, op, ": expected ", name, " to be float32, float64, bfloat16 or float16");
  }
}

// Bytes for a launcher, from torch's allocator: they live as long as the stream needs them.
inline Tensor scratch(const Tensor& like, int64_t bytes) {
  return new_empty(like, {bytes}, ScalarType::Byte);
}

inline void check_launch(const char* op, const char* error) {
  FASTSAE_CHECK(error == nullptr, op, ": ", error);
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like,
                         const char* like_name = "x") {
  FASTSAE_CHECK(t.device() == like.device(), op, ": expected ", name, " on the device of ",
                like_name);
}

}  // namespace fastsae::cuda
