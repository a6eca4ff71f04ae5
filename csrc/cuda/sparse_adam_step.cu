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
bool is_wide(const AdamParams& p) {
  for (const ParameterParams& m : {p.W_enc, p.W_dec}) {
    for (const void* t : {m.p, m.m, p.by_rows ? nullptr : m.v}) {
      if (!rows_aligned<F>(t, p.d)) return false;
    }
  }
  for (const void* t : {p.extra_W_enc, p.extra_W_dec}) {
    if (!rows_aligned<F>(t, p.d)) return false;
  }
  for (const void* t : {p.centered_rows, p.grad_rows}) {
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

// How a step is cut, and its scratch.
template <class F, class R>
struct Plan {
  using A = typename F::Acc;
  bool wide, large;  // large: 512 threads a block instead of 128
  Split split;
  int64_t groups, blocks, parts;
  int64_t shared;  // bytes of shared memory

  int32_t *offsets, *rows, *slots;  // the lists
  char* group_by_latent;            // the scratch of that
  int32_t* extra_rows;
  typename F::Bits *shares, *gradients;
  A *sums, *g_b_dec, *scale;
  double* squares;
  Segments<A> dec_segments, enc_segments;
  int64_t bytes;

  explicit Plan(const AdamParams& p) {
    const SparseActsParams& e = p.entries;
    wide = is_wide<F, R>(p);
    const int pack = wide ? R::kVector : 1;
    const int64_t row = 3 * p.d * static_cast<int64_t>(sizeof(A));
    large = row > 48 * 1024;
    split = split_elements(p.d);
    if (wide) split = split_block(p.d / pack, 4);
    if (wide && large) split = {p.d / pack, 4, (p.d / pack + 127) / 128};
    groups = (int64_t{e.d_sae} + kGroup - 1) / kGroup;
    shared = row <= kMostShared ? row : 0;
    blocks = groups;
    if (row > kMostShared) blocks = std::min<int64_t>(groups, 2 * multiprocessors());
    parts = (std::max<int64_t>(e.n, 1) + kColumnRows - 1) / kColumnRows +
            (groups + kColumnRows - 1) / kColumnRows;

    const int64_t later = e.capacity / kSegment;
    Scratch scratch(p.scratch);
    offsets = scratch.take<int32_t>(int64_t{e.d_sae} + 1);
    rows = scratch.take<int32_t>(e.capacity);
    slots = scratch.take<int32_t>(e.capacity);
    group_by_latent = scratch.take<char>(group_by_latent_scratch(e));
    extra_rows = scratch.take<int32_t>(p.extra_latents ? e.d_sae : 0);
    shares = scratch.take<typename F::Bits>(groups * p.d);
    sums = scratch.take<A>(parts * p.d);
    g_b_dec = scratch.take<A>(p.d);
    squares = scratch.take<double>(groups);
    scale = scratch.take<A>(1);
    gradients = scratch.take<typename F::Bits>(shared == row ? 0 : blocks * 3 * p.d);
    dec_segments = Segments<A>::take(scratch, later, split, pack);
    enc_segments = Segments<A>::take(scratch, later, split, pack);
    bytes = scratch.size();
  }
};

template <class F, class R, bool kWide, int kPacks, int kThreads, Move kMove>
void launch_adam(const AdamArgs<F, R>& args, const Plan<F, R>& plan, cudaStream_t stream) {
  if (plan.groups == 0) return;
  allow_shared(&adam_kernel<F, R, kWide, kPacks, kThreads, kMove>,
               static_cast<size_t>(plan.shared));
  FASTSAE_LAUNCH((adam_kernel<F, R, kWide, kPacks, kThreads, kMove>), grid_of(plan.blocks),
                 kThreads, static_cast<size_t>(plan.shared), stream, args);
}

template <class F, class R, bool kWide, int kPacks, int kThreads>
const char* launch(const AdamParams& p, const Plan<F, R>& plan, cudaStream_t stream) {
  using A = typename F::Acc;
  using Bits = typename F::Bits;
  const SparseActsParams& e = p.entries;
  const GroupByLatentParams group_by_latent{e, plan.offsets, plan.rows, plan.slots,
                                            plan.group_by_latent};
  const Format format = sizeof(A) == 8 ? Format::kFloat64 : Format::kFloat32;
  if (const char* error = launch_group_by_latent(group_by_latent, format, stream)) return error;

  int32_t* extra_rows = nullptr;
  if (p.extra_latents) {
    extra_rows = plan.extra_rows;
    cudaMemsetAsync(extra_rows, 0xff, static_cast<size_t>(e.d_sae) * 4, stream);  // -1
    FASTSAE_LAUNCH(extra_rows_kernel,
                   grid_of((p.extra_count + kColumnThreads - 1) / kColumnThreads), kColumnThreads,
                   0, stream, p.extra_latents, p.extra_count, e.d_sae, extra_rows);
  }

  ListsParams lists{group_by_latent.offsets,
                    group_by_latent.rows,
                    group_by_latent.slots,
                    e.d_sae,
                    e.capacity,
                    static_cast<int32_t>(std::min<int64_t>(e.n, INT32_MAX)),
                    e.values,
                    e.capacity,
                    true};
  ListsParams grad_lists = lists;
  grad_lists.values = p.grad_values;
  launch_segments<R, kWide, kPacks>(lists, p.grad_rows, p.d, plan.split, plan.dec_segments, stream);
  launch_segments<R, kWide, kPacks>(grad_lists, p.centered_rows, p.d, plan.split, plan.enc_segments,
                                    stream);

  const bool clips = !std::isinf(p.max_norm);
  A* scale = clips ? plan.scale : nullptr;
  AdamArgs<F, R> args{Parameter<F>(p.W_enc),
                      Parameter<F>(p.W_dec),
                      Parameter<F>(p.b_enc),
                      {lists},
                      {grad_lists},
                      plan.dec_segments,
                      plan.enc_segments,
                      static_cast<const typename R::Bits*>(p.grad_rows),
                      static_cast<const typename R::Bits*>(p.centered_rows),
                      extra_rows,
                      static_cast<const Bits*>(p.extra_W_enc),
                      static_cast<const Bits*>(p.extra_W_dec),
                      static_cast<const Bits*>(p.extra_b_enc),
                      static_cast<const Bits*>(p.grad_b_enc),
                      e.d_sae,
                      p.d,
                      p.d / (kWide ? F::kVector : 1),
                      plan.split.packs,
                      plan.split.chunks,
                      Adam<A>(p.adam),
                      nullptr,
                      p.unit_norm,
                      p.apply_b_dec ? plan.shares : nullptr,
                      plan.squares,
                      plan.shared ? nullptr : plan.gradients};

  const auto sum_b_dec = [&] {
    if (p.d == 0) return;
    const int64_t strips = (p.d + kColumnThreads - 1) / kColumnThreads;
    const auto parts = [](int64_t rows) { return (rows + kColumnRows - 1) / kColumnRows; };
    const auto add = [&](const A* x, int64_t rows, A* out) {
      if (rows == 0) return;
      FASTSAE_LAUNCH(column_sums_kernel<A>, grid_of(parts(rows) * strips), kColumnThreads, 0,
                     stream, x, rows, p.d, out);
    };
    const void* x = p.grad_b_dec ? p.grad_b_dec : p.grad_output;
    const int64_t rows = p.grad_b_dec ? 1 : e.n, groups = p.apply_b_dec ? plan.groups : 0;
    add(static_cast<const A*>(x), rows, plan.sums);
    add(reinterpret_cast<const A*>(plan.shares), groups, plan.sums + parts(rows) * p.d);
    FASTSAE_LAUNCH(last_column_sums_kernel<A>, grid_of((p.d + 31) / 32), 1024, 0, stream, plan.sums,
                   parts(rows) + parts(groups), p.d, plan.g_b_dec);
  };

  if (clips) {
    launch_adam<F, R, kWide, kPacks, kThreads, Move::kNone>(args, plan, stream);
    sum_b_dec();
    FASTSAE_LAUNCH(clip_kernel<A>, 1, 1024, 0, stream, plan.squares, plan.groups, plan.g_b_dec, p.d,
                   p.max_norm, p.clip, scale);
    args.scale = scale;
    args.shares = nullptr;
  }
  if (p.by_rows) launch_adam<F, R, kWide, kPacks, kThreads, Move::kAdamMini>(args, plan, stream);
  else launch_adam<F, R, kWide, kPacks, kThreads, Move::kAdam>(args, plan, stream);
  if (!clips) sum_b_dec();
  if (p.d > 0) {
    FASTSAE_LAUNCH(adam_vector_kernel<F>, grid_of((p.d + kColumnThreads - 1) / kColumnThreads),
                   kColumnThreads, 0, stream, Parameter<F>(p.b_dec), plan.g_b_dec, p.d, scale,
                   args.adam);
  }
  return launch_error();
}

template <class F, class R>
const char* launch_format(const AdamParams& p, cudaStream_t stream) {
  const Plan<F, R> plan(p);
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
  return format == Format::kFloat32 && is_wide<Float32, BFloat16>(params);
}

int64_t sparse_adam_step_scratch(const AdamParams& params, Format format) {
  if (format == Format::kFloat64) return Plan<Float64, Float64>(params).bytes;
  if (params.bf16_rows) return Plan<Float32, BFloat16>(params).bytes;
  return Plan<Float32, Float32>(params).bytes;
}

const char* launch_sparse_adam_step(const AdamParams& params, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (format == Format::kFloat64) return launch_format<Float64, Float64>(params, on);
  if (params.bf16_rows) return launch_format<Float32, BFloat16>(params, on);
  return launch_format<Float32, Float32>(params, on);
}

}  // namespace fastsae::cuda
