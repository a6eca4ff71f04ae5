// Launches of the selection within the product on Hopper.
//
// An eighth of the columns is multiplied into memory, and gives every row a list of candidates and
// a bound. The product of the other columns compares its sums with the bound where they are, and
// appends the few that reach it. The choice among the candidates is exact. Rows whose list was too
// small (their numbers ascend) are multiplied again, as many at a time as the memory of the eighth
// holds, and selected from whole: the host does not know whether there are any.
#include "cuda/hopper_topk.h"

#include "cuda/hopper_filter_kernel.cuh"
#include "cuda/hopper_overflow_kernel.cuh"
#include "cuda/hopper_product_launch.cuh"

namespace fastsae::cuda {
namespace {

// Candidates of a list for each that is selected: as many as are expected of a row in random order
// whose bound comes from an eighth of it.
constexpr int32_t kListPerK = 8;
// Candidates of a list, and rows that are multiplied again at a time, at least. Few in the
// emulation, so that lists overflow, and rows are multiplied again several times.
#ifdef FASTSAE_EMULATED
constexpr int32_t kLeastList = 16, kLeastAgain = 8;
#else
constexpr int32_t kLeastList = 256, kLeastAgain = kTileRows;
#endif

int64_t up_to_multiple(int64_t x, int64_t of) {
  return (x + of - 1) / of * of;
}

struct Plan {
  int32_t first;        // columns that are multiplied into memory
  int64_t pitch;        // of these
  int64_t again, wide;  // rows that are multiplied again at a time, and their pitch
  int32_t capacity;     // of a list
  // Where in scratch each part begins, and where the last one ends.
  int64_t sums, entries, count, bound, found, rows, x, end;
};

Plan plan(const HopperTopkParams& p) {
  Plan plan{};
  const int64_t eighth = std::max<int64_t>((p.m + 7) / 8, 4 * int64_t{p.k});
  plan.first = static_cast<int32_t>(std::min<int64_t>(up_to_multiple(eighth, kTileColumns), p.m));
  plan.pitch = up_to_multiple(plan.first, 4);
  plan.wide = up_to_multiple(p.m, 4);
  const int64_t fit = p.n * plan.pitch / plan.wide / kTileRows * kTileRows;
  plan.again = std::min<int64_t>(std::max<int64_t>(fit, kLeastAgain), p.n);
  plan.capacity = std::max(kListPerK * p.k, kLeastList);
  const auto take = [&](int64_t bytes) {
    const int64_t at = plan.end;
    plan.end = up_to_multiple(at + bytes, 256);
    return at;
  };
  plan.sums = take(4 * std::max(p.n * plan.pitch, plan.again * plan.wide));
  plan.entries = take(8 * int64_t{p.n} * plan.capacity);
  plan.count = take(4 * int64_t{p.n});
  plan.bound = take(4 * int64_t{p.n});
  plan.found = take(4);
  plan.rows = take(4 * int64_t{p.n});
  plan.x = take(2 * int64_t{p.n} * p.d);
  return plan;
}

}  // namespace

int64_t hopper_topk_scratch(const HopperTopkParams& p) {
  return plan(p).end;
}

const char* launch_hopper_topk(const HopperTopkParams& p, void* on) {
  if (p.n == 0 || p.k == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  const Plan plan = fastsae::cuda::plan(p);
  char* scratch = static_cast<char*>(p.scratch);
  float* sums = reinterpret_cast<float*>(scratch + plan.sums);
  const RowCandidates kept{reinterpret_cast<uint64_t*>(scratch + plan.entries),
                           reinterpret_cast<uint32_t*>(scratch + plan.count),
                           reinterpret_cast<float*>(scratch + plan.bound), plan.capacity};
  const Overflows overflows{reinterpret_cast<uint32_t*>(scratch + plan.found),
                            reinterpret_cast<int32_t*>(scratch + plan.rows)};

  const HopperProductParams part{p.x, p.W, p.n, plan.first, p.d, sums, plan.pitch};
  if (const char* error = launch_hopper_product(part, stream)) return error;
  const FilterRowsParams first{sums,       p.bias, p.mask, p.n,        plan.pitch,
                               plan.first, 0,      p.k,    p.absolute, kept};
  if (const char* error = launch_filter_rows(first, stream)) return error;

  HopperProductParams rest{p.x, p.W, p.n, p.m - plan.first, p.d, nullptr, 0};
  rest.W = static_cast<const char*>(p.W) + 2 * int64_t{plan.first} * p.d;
  const FilterSums filter{p.bias ? p.bias + plan.first : nullptr,
                          p.mask ? p.mask + plan.first : nullptr,
                          kept,
                          p.n,
                          rest.columns,
                          plan.first,
                          p.absolute};
  if (const char* error = launch_product_with(rest, filter, stream)) return error;

  if (cudaMemsetAsync(overflows.found, 0, 4, stream) != cudaSuccess) return launch_error();
  const int64_t blocks = (int64_t{p.n} + kOverflowThreads - 1) / kOverflowThreads;
  FASTSAE_LAUNCH(find_overflows_kernel, grid_of(blocks), kOverflowThreads, 0, stream, kept, p.n,
                 overflows);
  const ChooseRowsParams choose{kept, p.mask, p.n, p.k, p.relu, p.values, p.indices};
  if (const char* error = launch_choose_rows(choose, stream)) return error;

  uint4* gathered = reinterpret_cast<uint4*>(scratch + plan.x);
  const int64_t few = 2 * multiprocessors();
  FASTSAE_LAUNCH(gather_overflows_kernel, grid_of(std::min<int64_t>(p.n, few)), kOverflowThreads, 0,
                 stream, static_cast<const uint4*>(p.x), p.d / 8, overflows, gathered);
  for (int64_t before = 0; before < p.n; before += plan.again) {
    const int64_t rows = std::min(plan.again, p.n - before);
    const HopperProductParams again{gathered + before * (p.d / 8),
                                    p.W,
                                    static_cast<int32_t>(rows),
                                    p.m,
                                    p.d,
                                    sums,
                                    plan.wide,
                                    overflows.found,
                                    static_cast<uint32_t>(before)};
    if (const char* error = launch_hopper_product(again, stream)) return error;
    const SelectOverflowsArgs select{reinterpret_cast<const uint32_t*>(sums),
                                     plan.wide,
                                     static_cast<unsigned>(before),
                                     static_cast<unsigned>(rows),
                                     p.bias,
                                     p.mask,
                                     p.m,
                                     p.k,
                                     p.relu,
                                     p.absolute,
                                     overflows,
                                     p.values,
                                     p.indices};
    FASTSAE_LAUNCH(select_overflows_kernel, grid_of(std::min(rows, few)), kOverflowThreads, 0,
                   stream, select);
  }
  return launch_error();
}

}  // namespace fastsae::cuda
