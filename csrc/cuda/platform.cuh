// What the device code is compiled by: nvcc, or the host emulation of the tests. The two spellings
// that differ are a launch and dynamic shared memory.
#pragma once

#ifdef FASTSAE_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>
#define FASTSAE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#endif
