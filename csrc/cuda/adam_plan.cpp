#include "cuda/adam_plan.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastsae::cuda {
namespace {

constexpr const char* kNames[] = {"direct", "staged"};

// The place of a name, or -1.
int parse(const char* said) {
  for (int way = 0; way < 2; ++way) {
    if (std::strcmp(said, kNames[way]) == 0) return way;
  }
  return -1;
}

int initial() {
  const char* wanted = std::getenv("FASTSAE_CUDA_ADAM");
  if (wanted == nullptr || *wanted == '\0') return 0;
  const int way = parse(wanted);
  if (way < 0) {
    std::fprintf(stderr,
                 "fastsae: expected FASTSAE_CUDA_ADAM to be direct or staged, got %s; using "
                 "direct\n",
                 wanted);
  }
  return way < 0 ? 0 : way;
}

std::atomic<int>& setting() {
  static std::atomic<int> current{initial()};
  return current;
}

}  // namespace

bool adam_is_staged() {
  return setting() == 1;
}

}  // namespace fastsae::cuda

extern "C" {

__attribute__((visibility("default"))) int fastsae_set_cuda_adam(const char* way) {
  using namespace fastsae::cuda;
  const int found = parse(way);
  if (found < 0) return -1;
  setting() = found;
  return 0;
}

__attribute__((visibility("default"))) const char* fastsae_cuda_adam() {
  using namespace fastsae::cuda;
  return kNames[setting()];
}
}
