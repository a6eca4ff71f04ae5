// Launches of the topk kernels, and which of them for which shape. No torch header: nvcc takes
// seconds, and the emulation builds it.
#include "cuda/topk.h"

#include <algorithm>

#include "cuda/topk_kernel.cuh"
#include "cuda/topk_radix_kernel.cuh"

namespace fastsae::cuda {
namespace {

constexpr int kMostHeld = 512;          // the largest k that is selected in one read
constexpr int kPart = 1 << 17;          // elements of a row that one block reads
constexpr int kShortestPart = 1 << 14;  // a block's work at least
constexpr int kMostCandidates = 6144;   // of a block: 48 KiB
constexpr int kMostMerged = 4096;       // candidates of all parts of a row: 32 KiB

int next_power_of_two(int k) {
  int size = 1;
  while (size < k) size <<= 1;
  return size;
}
int up_to_multiple(int64_t x, int of) {
  return static_cast<int>((x + of - 1) / of * of);
}

// The kernel: threads and vectors that hold the start of a row, group maxima per thread.
enum class Kind { kRadix, k256x1, k512x1, k512x4 };

struct Plan {
  Kind kind;
  int parts, part_size;
  int capacity;     // of candidates
  int sort_blocks;  // of sort_kernel
};

Plan plan(const TopkParams& p, Format format) {
  const int64_t target_blocks = 4 * multiprocessors();
  Plan plan{Kind::kRadix, 1, p.m, 0, static_cast<int>(std::min<int64_t>(p.n, target_blocks))};
  if (format == Format::kFloat64 || p.k > kMostHeld || 4 * int64_t{p.k} > p.m) return plan;
  const int64_t needed = (int64_t{p.m} + kPart - 1) / kPart;
  const int64_t target = std::min<int64_t>(target_blocks / std::max<int64_t>(p.n, 1),
                                           p.m / std::max(kShortestPart, 16 * p.k));
  const int64_t parts =
      std::max(needed, std::min<int64_t>(target, kMostMerged / next_power_of_two(p.k)));
  if (parts * p.k > kMostMerged) return plan;
  plan.parts = static_cast<int>(std::max<int64_t>(1, parts));
  plan.part_size = plan.parts == 1 ? p.m : up_to_multiple((p.m + parts - 1) / parts, 64);
  plan.kind = p.k > kMostRanked                        ? Kind::k512x4
              : p.k > 64 || plan.part_size > kPart / 2 ? Kind::k512x1
                                                       : Kind::k256x1;
  // Twice the candidates that are expected of a row in random order.
  const int held = plan.kind == Kind::k256x1 || format == Format::kFloat32 ? 8192 : 16384;
  const int groups = plan.kind == Kind::k256x1 ? 256 : plan.kind == Kind::k512x1 ? 512 : 2048;
  const int64_t expected = int64_t{p.k} * std::max(plan.part_size, held) / held;
  const int64_t candidates = 2 * expected + expected * p.k / groups + 256;
  plan.capacity = std::min(up_to_multiple(candidates, 256), kMostCandidates);
  return plan;
}

// Launches the kernel that holds 16 kVectors bytes of a row per thread, kResident blocks at a time
// on a multiprocessor.
template <class F, bool kAffine, int kThreads, int kVectors, int kMaxima, int kResident>
void launch_held(TopkArgs<F> a, cudaStream_t stream) {
  a.ahead = int64_t{kResident} * multiprocessors();
  const size_t shared = sizeof(uint64_t) * static_cast<size_t>(a.capacity + a.winner_capacity);
  allow_shared(&topk_kernel<F, kAffine, kThreads, kVectors, kMaxima, kResident>, shared);
  FASTSAE_LAUNCH((topk_kernel<F, kAffine, kThreads, kVectors, kMaxima, kResident>),
                 grid_of(a.n * a.parts), kThreads, shared, stream, a);
  if (a.parts > 1) {
    constexpr int kMergeThreads = 256;
    const size_t merged = sizeof(uint64_t) * static_cast<size_t>(a.parts * a.k + a.winner_capacity);
    allow_shared(&merge_parts_kernel<F, kAffine, kMergeThreads, kMaxima == 1>, merged);
    FASTSAE_LAUNCH((merge_parts_kernel<F, kAffine, kMergeThreads, kMaxima == 1>), grid_of(a.n),
                   kMergeThreads, merged, stream, a);
  }
}

template <class F, bool kAffine>
const char* launch(const TopkParams& p, Format format, cudaStream_t stream) {
  using Bits = typename F::Bits;
  const Plan plan = fastsae::cuda::plan(p, format);
  uint64_t* scratch = static_cast<uint64_t*>(p.scratch);
  const TopkArgs<F> a{static_cast<const Bits*>(p.x),
                      static_cast<const typename F::Acc*>(p.bias),
                      p.mask,
                      p.n,
                      p.m,
                      p.k,
                      p.sorted,
                      p.relu,
                      static_cast<Bits*>(p.values),
                      p.indices,
                      plan.parts,
                      plan.part_size,
                      plan.capacity,
                      p.k > kMostRanked ? next_power_of_two(p.k) : p.k + kSpare,
                      0,
                      scratch};
  if constexpr (sizeof(Bits) < 8) {
    constexpr bool kWide = sizeof(Bits) == 4;
    if (plan.kind == Kind::k256x1) {
      launch_held<F, kAffine, 256, kWide ? 8 : 4, 1, kWide ? 3 : 5>(a, stream);
    }
    if (plan.kind == Kind::k512x1) launch_held<F, kAffine, 512, 4, 1, 2>(a, stream);
    if (plan.kind == Kind::k512x4) launch_held<F, kAffine, 512, 4, 4, 2>(a, stream);
  }
  if (plan.kind == Kind::kRadix) {
    FASTSAE_LAUNCH((radix_topk_kernel<F, kAffine>), grid_of(p.n), kRadixThreads, 0, stream, a);
    if (p.sorted) {
      FASTSAE_LAUNCH(sort_kernel<F>, static_cast<unsigned>(plan.sort_blocks), kRadixThreads, 0,
                     stream, p.n, p.k, next_power_of_two(p.k), scratch, a.values, a.indices);
    }
  }
  return launch_error();
}

}  // namespace

int64_t topk_scratch(const TopkParams& p, Format format) {
  const Plan plan = fastsae::cuda::plan(p, format);
  int64_t entries = 0;
  if (plan.kind != Kind::kRadix) entries = plan.parts > 1 ? p.n * plan.parts * p.k : 0;
  else if (p.sorted) entries = 2 * int64_t{plan.sort_blocks} * next_power_of_two(p.k);
  return entries * static_cast<int64_t>(sizeof(uint64_t));
}

const char* launch_topk(const TopkParams& params, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (sizeof(typename F::Bits) >= 4) {
      if (params.bias || params.mask || params.relu) return launch<F, true>(params, format, on);
    }
    return launch<F, false>(params, format, on);
  });
}

}  // namespace fastsae::cuda
