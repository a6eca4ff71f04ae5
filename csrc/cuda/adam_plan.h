// How sparse_adam_step_ gets the rows that it moves. No torch, no CUDA.
#pragma once

namespace fastsae::cuda {

// Whether rows are copied into shared memory ahead of time, where they fit: what FASTSAE_CUDA_ADAM
// or the last call of fastsae_set_cuda_adam said, or false. Only a measurement on the hardware in
// question may put another default here.
bool adam_is_staged();

}  // namespace fastsae::cuda

// For tests and measurements, called through ctypes: "direct" or "staged". Returns 0, or -1 if
// `way` is neither (nothing changes then).
extern "C" int fastsae_set_cuda_adam(const char* way);
extern "C" const char* fastsae_cuda_adam();
