#include "cpu/vec_scalar.h"

#define FASTSAE_LEVEL Isa::kScalar
#include "cpu/level_impl.h"
