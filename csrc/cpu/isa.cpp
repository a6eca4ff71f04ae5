#include "cpu/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastsae::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return Isa::kScalar;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  return Isa::kAvx2;
#else
  return Isa::kScalar;
#endif
}

int level_of(const char* name) {
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
  }
  return -1;
}

int initial_level() {
  const int best = static_cast<int>(best_isa());
  const char* wanted = std::getenv("FASTSAE_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  const int level = level_of(wanted);
  if (level >= 0 && level <= best) return level;
  std::fprintf(stderr,
               "fastsae: expected FASTSAE_ISA to be scalar, avx2 or avx512 and within what this "
               "machine has (%s), got %s; using %s\n",
               kNames[best], wanted, kNames[best]);
  return best;
}

std::atomic<int>& level() {
  static std::atomic<int> current{initial_level()};
  return current;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  static const bool found = best_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

Isa isa() {
  return static_cast<Isa>(level().load(std::memory_order_relaxed));
}

}  // namespace fastsae::cpu

extern "C" {

__attribute__((visibility("default"))) const char* fastsae_isa() {
  return fastsae::cpu::kNames[static_cast<int>(fastsae::cpu::isa())];
}

__attribute__((visibility("default"))) const char* fastsae_best_isa() {
  return fastsae::cpu::kNames[static_cast<int>(fastsae::cpu::best_isa())];
}

__attribute__((visibility("default"))) int fastsae_has_bf16() {
  using namespace fastsae::cpu;
  return isa() == Isa::kAvx512 && has_avx512_bf16();
}

__attribute__((visibility("default"))) int fastsae_set_isa(const char* name) {
  const int wanted = fastsae::cpu::level_of(name);
  if (wanted < 0 || wanted > static_cast<int>(fastsae::cpu::best_isa())) return -1;
  fastsae::cpu::level().store(wanted, std::memory_order_relaxed);
  return 0;
}
}
