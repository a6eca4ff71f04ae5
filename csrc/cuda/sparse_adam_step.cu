// Launches of the sparse_adam_step_ kernels: group_by_latent, segments of long lists, the gradient
// of b_dec and the norm where it clips, then the step itself.
#include "cuda/sparse_adam_step.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/sparse_adam_step_kernel.cuh"
#include "cuda/group_by_latent.h"

namespace fastsae::cuda {
namespace {

constexpr int kMostShared = 96 * 1024;  // of a block, on every architecture

template <class F, class R>
bool wide(const AdamParams& p) {
  for (const MovingParams& m : {p.W_enc, p.W_dec}) {
    for (const void* t : {m.p, m.m, m.v}) {
      if (!rows_aligned<F>(t, p.d)) return false;
    }
  }
  for (const void* t : {p.added_W_enc, p.added_W_dec}) {
    if (!rows_aligned<F>(t, p.d)) return false;
  }
  for (const void* t : {p.centred_rows, p.error_rows}) {
    if (!rows_aligned<R>(t, p.d)) return false;
  }
  return true;
}

// How a block's warps share the two rows of a latent: in as few and short rounds as possible. A
// round waits for memory about as long as two packs take, however many it has.
Split split_block(int packs, int warps) {
  Split best{packs, 1, std::max(1, (packs + 31) / 32)};
  const auto time = [&](const Split& s) {
    return (2 * s.chunks + warps - 1) / warps * (s.per_lane + 2);
  };
  for (int per_lane = 2; per_lane <= 4; ++per_lane) {
    const Split next{packs, per_lane, std::max(1, (packs + 32 * per_lane - 1) / (32 * per_lane))};
    if (time(next) <= time(best)) best = next;
  }
  return best;
}

struct Plan {
  bool wide, large;  // large: 512 threads a block instead of 128
  Split split;
  int64_t groups, blocks, parts;
  int64_t shared;  // bytes of shared memory
  // Offsets into scratch, and its size.
  int64_t offsets, rows, slots, group_by_latent, added, shares, sums, g_b_dec, squares, scale, held;
  int64_t strips[2], weights[2];
  int64_t bytes;
};

template <class F, class R>
Plan plan(const AdamParams& p) {
  using A = typename F::Acc;
  constexpr int64_t kNumber = sizeof(A);
  const EntriesParams& e = p.entries;
  Plan plan{};
  plan.wide = wide<F, R>(p);
  const int pack = plan.wide ? R::kVector : 1;
  const int64_t row = 3 * p.d * kNumber;
  plan.large = row > 48 * 1024;
  plan.split = split_elements(p.d);
  if (plan.wide) plan.split = split_block(p.d / pack, 4);
  if (plan.wide && plan.large) plan.split = {p.d / pack, 4, (p.d / pack + 127) / 128};
  plan.groups = (int64_t{e.d_sae} + kGroup - 1) / kGroup;
  plan.shared = row <= kMostShared ? row : 0;
  plan.blocks = plan.groups;
  if (row > kMostShared) plan.blocks = std::min<int64_t>(plan.groups, 2 * multiprocessors());
  plan.parts =
      (e.n + kColumnRows - 1) / kColumnRows + (plan.groups + kColumnRows - 1) / kColumnRows;
  const int64_t later = e.cap / kSegment;
  Layout layout;
  plan.offsets = layout.add((int64_t{e.d_sae} + 1) * 4);
  plan.rows = layout.add(int64_t{e.cap} * 4);
  plan.slots = layout.add(int64_t{e.cap} * 4);
  plan.group_by_latent = layout.add(group_by_latent_scratch(e));
  plan.added = layout.add(p.added ? int64_t{e.d_sae} * 4 : 0);
  plan.shares = layout.add(plan.groups * p.d * kNumber);
  plan.sums = layout.add(plan.parts * p.d * kNumber);
  plan.g_b_dec = layout.add(p.d * kNumber);
  plan.squares = layout.add(plan.groups * int64_t{sizeof(double)});
  plan.scale = layout.add(kNumber);
  plan.held = layout.add(plan.shared == row ? 0 : plan.blocks * row);
  for (int i = 0; i < 2; ++i) {
    plan.strips[i] = layout.add(Segments<A>::strip_bytes(later, plan.split, pack));
    plan.weights[i] = layout.add(Segments<A>::weight_bytes(later));
  }
  plan.bytes = layout.bytes();
  return plan;
}

template <class F, class R, bool kWide, int kPacks, int kThreads, bool kUpdate>
void launch_adam(const AdamArgs<F, R>& args, const Plan& plan, cudaStream_t stream) {
  if (plan.groups == 0) return;
  allow_shared(&adam_kernel<F, R, kWide, kPacks, kThreads, kUpdate>,
               static_cast<size_t>(plan.shared));
  FASTSAE_LAUNCH((adam_kernel<F, R, kWide, kPacks, kThreads, kUpdate>), grid_of(plan.blocks),
                 kThreads, static_cast<size_t>(plan.shared), stream, args);
}

template <class F, class R, bool kWide, int kPacks, int kThreads>
const char* launch(const AdamParams& p, const Plan& plan, cudaStream_t stream) {
  using A = typename F::Acc;
  using Bits = typename F::Bits;
  const EntriesParams& e = p.entries;
  char* space = static_cast<char*>(p.scratch);
  const auto at = [space](int64_t offset, auto* type) {
    return reinterpret_cast<decltype(type)>(space + offset);
  };
  constexpr A* kNumbers = nullptr;
  constexpr Bits* kBits = nullptr;
  constexpr int32_t* kInts = nullptr;

  GroupByLatentParams group_by_latent{e, at(plan.offsets, kInts), at(plan.rows, kInts),
                                      at(plan.slots, kInts), space + plan.group_by_latent};
  const Format format = sizeof(A) == 8 ? Format::kFloat64 : Format::kFloat32;
  if (const char* error = launch_group_by_latent(group_by_latent, format, stream)) return error;

  int32_t* added = nullptr;
  if (p.added) {
    added = at(plan.added, kInts);
    cudaMemsetAsync(added, 0xff, static_cast<size_t>(e.d_sae) * 4, stream);  // -1
    FASTSAE_LAUNCH(added_rows_kernel,
                   grid_of((p.added_count + kColumnThreads - 1) / kColumnThreads), kColumnThreads,
                   0, stream, p.added, p.added_count, e.d_sae, added);
  }

  ListsParams lists{group_by_latent.offsets,
                    group_by_latent.rows,
                    group_by_latent.slots,
                    e.d_sae,
                    e.cap,
                    static_cast<int32_t>(std::min<int64_t>(e.n, INT32_MAX)),
                    e.values,
                    e.cap,
                    true};
  ListsParams grad_lists = lists;
  grad_lists.values = p.grad_values;
  const Segments<A> later[2] = {{at(plan.strips[0], kNumbers), at(plan.weights[0], kNumbers)},
                                {at(plan.strips[1], kNumbers), at(plan.weights[1], kNumbers)}};
  launch_segments<R, kWide, kPacks>(lists, p.error_rows, p.d, plan.split, later[0], stream);
  launch_segments<R, kWide, kPacks>(grad_lists, p.centred_rows, p.d, plan.split, later[1], stream);

  const bool clips = !std::isinf(p.max_norm);
  A* g_b_dec = at(plan.g_b_dec, kNumbers);
  A* scale = clips ? at(plan.scale, kNumbers) : nullptr;
  double* squares = reinterpret_cast<double*>(space + plan.squares);
  AdamArgs<F, R> args{Moving<F>(p.W_enc),
                      Moving<F>(p.W_dec),
                      Moving<F>(p.b_enc),
                      {lists},
                      {grad_lists},
                      later[0],
                      later[1],
                      static_cast<const typename R::Bits*>(p.error_rows),
                      static_cast<const typename R::Bits*>(p.centred_rows),
                      added,
                      static_cast<const Bits*>(p.added_W_enc),
                      static_cast<const Bits*>(p.added_W_dec),
                      static_cast<const Bits*>(p.added_b_enc),
                      e.d_sae,
                      p.d,
                      p.d / (kWide ? F::kVector : 1),
                      plan.split.packs,
                      plan.split.chunks,
                      Adam<A>(p.adam),
                      nullptr,
                      p.unit_norm,
                      at(plan.shares, kBits),
                      squares,
                      plan.shared ? nullptr : at(plan.held, kBits)};

  const auto sum_b_dec = [&] {
    if (p.d == 0) return;
    A* sums = at(plan.sums, kNumbers);
    const int64_t strips = (p.d + kColumnThreads - 1) / kColumnThreads;
    const auto parts = [](int64_t rows) { return (rows + kColumnRows - 1) / kColumnRows; };
    const auto add = [&](const A* x, int64_t rows, A* out) {
      if (rows == 0) return;
      FASTSAE_LAUNCH(column_sums_kernel<A>, grid_of(parts(rows) * strips), kColumnThreads, 0,
                     stream, x, rows, p.d, out);
    };
    add(static_cast<const A*>(p.error), e.n, sums);
    add(at(plan.shares, kNumbers), plan.groups, sums + parts(e.n) * p.d);
    FASTSAE_LAUNCH(last_column_sums_kernel<A>, grid_of((p.d + 31) / 32), 1024, 0, stream, sums,
                   plan.parts, p.d, g_b_dec);
  };

  if (clips) {
    launch_adam<F, R, kWide, kPacks, kThreads, false>(args, plan, stream);
    sum_b_dec();
    FASTSAE_LAUNCH(clip_kernel<A>, 1, 1024, 0, stream, squares, plan.groups, g_b_dec, p.d,
                   p.max_norm, scale);
    args.scale = scale;
    args.shares = nullptr;
  }
  launch_adam<F, R, kWide, kPacks, kThreads, true>(args, plan, stream);
  if (!clips) sum_b_dec();
  if (p.d > 0) {
    FASTSAE_LAUNCH(adam_vector_kernel<F>, grid_of((p.d + kColumnThreads - 1) / kColumnThreads),
                   kColumnThreads, 0, stream, Moving<F>(p.b_dec), g_b_dec, p.d, scale, args.adam);
  }
  return launch_error();
}

template <class F, class R>
const char* launch_format(const AdamParams& p, cudaStream_t stream) {
  const Plan plan = fastsae::cuda::plan<F, R>(p);
  if constexpr (std::is_same_v<F, R>) {
    if (!plan.wide && plan.large) return launch<F, R, false, 4, 512>(p, plan, stream);
    if (!plan.wide) return launch<F, R, false, 4, 128>(p, plan, stream);
  }
  if (plan.large) return launch<F, R, true, 4, 512>(p, plan, stream);
  const char* error = nullptr;
  with_packs(plan.split.per_lane, [&](auto packs) {
    error = launch<F, R, true, decltype(packs)::value, 128>(p, plan, stream);
  });
  return error;
}

}  // namespace

bool takes_bf16_rows(const AdamParams& params, Format format) {
  return format == Format::kFloat32 && wide<Float32, BFloat16>(params);
}

int64_t sparse_adam_step_scratch(const AdamParams& params, Format format) {
  if (format == Format::kFloat64) return plan<Float64, Float64>(params).bytes;
  if (params.bf16_rows) return plan<Float32, BFloat16>(params).bytes;
  return plan<Float32, Float32>(params).bytes;
}

const char* launch_sparse_adam_step(const AdamParams& params, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (format == Format::kFloat64) return launch_format<Float64, Float64>(params, on);
  if (params.bf16_rows) return launch_format<Float32, BFloat16>(params, on);
  return launch_format<Float32, Float32>(params, on);
}

}  // namespace fastsae::cuda
