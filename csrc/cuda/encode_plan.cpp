#include "cuda/encode_plan.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace fastsae::cuda {
namespace {

constexpr const char* kNames[] = {"rows", "blocks", "overlap", "hopper"};
constexpr int kWays = 4;

bool has_sizes(EncodeWay way) {
  return way == EncodeWay::kBlocks || way == EncodeWay::kOverlap;
}

constexpr char kExpected[] =
    "rows, hopper, blocks, overlap, blocks:ROWSxLATENTS or overlap:ROWSxLATENTS "
    "(latents: a multiple of 64 up to 8192)";

EncodePlan of_way(EncodeWay way) {
  if (!has_sizes(way)) return {way, 0, 0};
  return {way, kBlockRows, way == EncodeWay::kOverlap ? kBlockColumns / 2 : kBlockColumns};
}

bool parse(const char* said, EncodePlan* plan) {
  for (int way = 0; way < kWays; ++way) {
    const size_t length = std::strlen(kNames[way]);
    if (std::strncmp(said, kNames[way], length) != 0) continue;
    *plan = of_way(static_cast<EncodeWay>(way));
    if (said[length] == '\0') return true;
    long long rows = 0, columns = 0;
    int end = 0;
    if (!has_sizes(plan->way) ||
        std::sscanf(said + length, ":%lldx%lld%n", &rows, &columns, &end) != 2 ||
        said[length + static_cast<size_t>(end)] != '\0' || rows < 1 || columns < kColumnStep ||
        columns > kMostColumns || columns % kColumnStep != 0) {
      return false;
    }
    plan->rows = rows;
    plan->columns = columns;
    return true;
  }
  return false;
}

std::mutex& setting_mutex() {
  static std::mutex mutex;
  return mutex;
}

struct Setting {
  EncodePlan plan;
  std::string name = kNames[0];

  Setting() {
    const char* wanted = std::getenv("FASTSAE_CUDA_ENCODE");
    if (wanted == nullptr || *wanted == '\0') return;
    if (parse(wanted, &plan)) name = wanted;
    else
      std::fprintf(stderr, "fastsae: expected FASTSAE_CUDA_ENCODE to be %s, got %s; using rows\n",
                   kExpected, wanted);
  }
};

Setting& setting() {
  static Setting current;
  return current;
}

}  // namespace

EncodePlan encode_plan(int64_t n, int64_t d_sae) {
  EncodePlan plan;
  {
    const std::lock_guard<std::mutex> guard(setting_mutex());
    plan = setting().plan;
  }
  if (!has_sizes(plan.way) || n == 0 || d_sae == 0) return {};
  // All about equal: no small ones at the end.
  const auto part = [](int64_t size, int64_t most, int64_t step) {
    const int64_t count = (size + most - 1) / most;
    return std::min(most, ((size + count - 1) / count + step - 1) / step * step);
  };
  plan.rows = part(n, plan.rows, 1);
  plan.columns = part(d_sae, plan.columns, kColumnStep);
  return plan;
}

bool encode_plan_is_hopper() {
  const std::lock_guard<std::mutex> guard(setting_mutex());
  return setting().plan.way == EncodeWay::kHopper;
}

}  // namespace fastsae::cuda

extern "C" {

__attribute__((visibility("default"))) int fastsae_set_cuda_encode(const char* way) {
  using namespace fastsae::cuda;
  EncodePlan plan;
  if (!parse(way, &plan)) return -1;
  const std::lock_guard<std::mutex> guard(setting_mutex());
  setting().plan = plan;
  setting().name = way;
  return 0;
}

__attribute__((visibility("default"))) const char* fastsae_cuda_encode() {
  using namespace fastsae::cuda;
  static thread_local std::string name;
  const std::lock_guard<std::mutex> guard(setting_mutex());
  name = setting().name;
  return name.c_str();
}
}
