// Which instruction set the CPU kernels run on: detected once, overridden by FASTSAE_ISA or
// set_isa.
#pragma once

namespace fastsae::cpu {

enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

Isa isa();
Isa best_isa();
// AVX-512 BF16 comes with some of the processors that have AVX-512.
bool has_avx512_bf16();

}  // namespace fastsae::cpu

// For fastsae._host and for those without it (ctypes); C linkage, so the names are stable.
extern "C" {
// "scalar", "avx2" or "avx512".
const char* fastsae_isa();
const char* fastsae_best_isa();
// 1 if bfloat16 multiplications run in hardware at the current level.
int fastsae_has_bf16();
// Returns 0, or -1 when `name` is unknown or above what this machine has (nothing changes then).
int fastsae_set_isa(const char* name);
}
