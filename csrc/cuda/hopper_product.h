// x W^T of bfloat16 matrices on Hopper's tensor cores: what a caller and the launcher share.
#pragma once

#include <cstdint>

namespace fastsae::cuda {

struct HopperProductParams {
  const void* x;  // [n, d] bfloat16, contiguous, from a multiple of 16 bytes on
  const void* W;  // [columns, d], the same
  int32_t n, columns;
  int32_t d;   // a multiple of 8
  float* out;  // [n, pitch]
  int64_t pitch;
  // On the device: only the first *found - before rows are there, if they are fewer; or null. Of
  // the others, some are written.
  const uint32_t* found = nullptr;
  uint32_t before = 0;
};

// Whether the current device has it: it is compiled for sm_90a alone.
bool has_hopper_product();

// Null, or what is wrong. Nothing is launched where n or columns is 0; d is at least 8.
const char* launch_hopper_product(const HopperProductParams& p, void* stream);

}  // namespace fastsae::cuda
