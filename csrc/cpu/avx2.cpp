#include "cpu/vec_avx2.h"

#define FASTSAE_LEVEL Isa::kAvx2
#include "cpu/level_impl.h"
