#include "cpu/vec_avx512.h"

#define FASTSAE_LEVEL Isa::kAvx512
#include "cpu/level_impl.h"
