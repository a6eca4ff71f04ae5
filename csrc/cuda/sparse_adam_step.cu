// Launches of the sparse_adam_step_ kernels: group_by_latent, segments of long lists, the gradient
// of b_dec and the norm where it clips, then the step itself. Where encoder and decoder are unlike,
// the kernel is that of sparse_adam_step_by_side.cu, and where rows are copied ahead of time
// (adam_plan.h) that of sparse_adam_step_staged.cu.
#include "cuda/sparse_adam_step.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "cuda/adam_plan.h"
#include "cuda/adam_staged.cuh"
#include "cuda/group_by_latent.h"
#include "cuda/sparse_adam_step_kernel.cuh"

namespace fastsae::cuda {
namespace {

constexpr int kMostShared = 96 * 1024;  // of a block, on every architecture

// The rows of one matrix that a step reads, and their width.
template <class F, class R>
bool is_wide(const AdamParams& p, const ParameterParams& W, const void* extra, const void* more,
             const void* gathered, const uint16_t* copy, int d) {
  if (!rows_aligned<F>(W.p, d)) return false;
  for (const void* t : {W.m, p.by_rows ? nullptr : W.v}) {
    const bool aligned =
        p.bf16_averages ? reinterpret_cast<uintptr_t>(t) % 8 == 0 : rows_aligned<F>(t, d);
    if (!aligned) return false;
  }
  if (reinterpret_cast<uintptr_t>(copy) % 8 != 0) return false;  // a row of a wide d is then, too
  return rows_aligned<F>(extra, d) && rows_aligned<F>(more, d) && rows_aligned<R>(gathered, d);
}

template <class F, class R>
bool is_wide(const AdamParams& p) {
  if (p.by_side() && std::is_same_v<F, Float64>) return false;  // no such kernel
  return is_wide<F, R>(p, p.W_enc, p.extra_W_enc, p.grad_W_enc, p.centered_rows, p.bf16_W_enc,
                       p.d_in) &&
         is_wide<F, R>(p, p.W_dec, p.extra_W_dec, p.grad_W_dec, p.grad_rows, p.bf16_W_dec, p.d_out);
}

Split split_packs(int packs, int per_lane) {
  return {packs, per_lane, std::max(1, (packs + 32 * per_lane - 1) / (32 * per_lane))};
}

// How a block's warps share the two rows of a latent: in as few and short rounds as possible. A
// round waits for memory about as long as two packs take, however many it has. Returns one of
// `choices`, packs per lane.
int split_block(int enc_packs, int dec_packs, int warps, std::initializer_list<int> choices) {
  const auto time = [&](int per_lane) {
    const int chunks =
        split_packs(enc_packs, per_lane).chunks + split_packs(dec_packs, per_lane).chunks;
    return (chunks + warps - 1) / warps * (per_lane + 2);
  };
  int best = *choices.begin();
  for (int per_lane : choices) {
    if (time(per_lane) <= time(best)) best = per_lane;
  }
  return best;
}

// Threads of a block of the staged kernel, such that a multiprocessor has 512; 0: a block does not
// fit.
int staged_threads(int64_t shared) {
  constexpr int64_t kStatic = 3 * 1024;  // more than its arrays, and what the driver takes
  const SharedMemory there = shared_memory();
  if (shared + kStatic > there.block) return 0;
  const int64_t blocks = there.multiprocessor / (shared + kStatic);
  return blocks >= 4 ? 128 : blocks >= 2 ? 256 : 512;
}

// Entries by latent.
struct Lists {
  int32_t *offsets, *rows, *slots;
  static Lists take(Scratch& scratch, const SparseActsParams& e) {
    int32_t* offsets = scratch.take<int32_t>(int64_t{e.d_sae} + 1);
    int32_t* rows = scratch.take<int32_t>(e.capacity);
    return {offsets, rows, scratch.take<int32_t>(e.capacity)};
  }
  ListsParams of(const SparseActsParams& e, const void* values) const {
    return {offsets, rows,       slots,
            e.d_sae, e.capacity, static_cast<int32_t>(std::min<int64_t>(e.n, INT32_MAX)),
            values,  e.capacity, true};
  }
};

// How a step is cut, and its scratch.
template <class F, class R>
struct Plan {
  using A = typename F::Acc;
  bool wide, large;  // large: 512 threads a block instead of 128
  int staged;        // threads of a block of the staged kernel; 0: it is not used
  Split enc, dec;
  int64_t groups, blocks, parts;
  int64_t shared;  // bytes of shared memory

  Lists dec_lists, enc_lists;
  char* group_by_latent;  // the scratch of that
  int32_t* extra_rows;
  typename F::Bits *shares, *gradients;
  A *sums, *g_b_dec, *scale;
  AdamRate<A>* rate;
  double* squares;
  Segments<A> dec_segments, enc_segments;
  int64_t bytes;

  explicit Plan(const AdamParams& p) {
    const SparseActsParams& e = p.dec_entries;
    wide = is_wide<F, R>(p);
    const int pack = wide ? R::kVector : 1;
    const int64_t numbers = p.d_out + 2 * int64_t{p.d_in};
    const int64_t row = numbers * static_cast<int64_t>(sizeof(A));
    large = row > 48 * 1024;
    staged = 0;
    if (std::is_same_v<F, Float32> && wide && !large && !p.by_rows && adam_is_staged()) {
      staged = staged_threads(staged_shared(p.d_in, p.d_out, p.bf16_averages));
    }
    enc = split_elements(p.d_in), dec = split_elements(p.d_out);
    if (wide) {
      const int in = p.d_in / pack, out = p.d_out / pack;
      const int most = p.by_side() || staged ? kMostPacks<R> : 4;
      int per_lane = most;
      if (staged == 512) per_lane = 2;
      else if (staged) per_lane = split_block(in, out, staged / 32, {2, most});
      else if (!large && p.by_side()) per_lane = split_block(in, out, 4, {2, most});
      else if (!large) per_lane = split_block(in, out, 4, {1, 2, 3, 4});
      enc = split_packs(in, per_lane), dec = split_packs(out, per_lane);
    }
    groups = (int64_t{e.d_sae} + kGroup - 1) / kGroup;
    shared = row <= kMostShared ? row : 0;
    blocks = groups;
    if (row > kMostShared) blocks = std::min<int64_t>(groups, 2 * multiprocessors());
    parts = (std::max<int64_t>(e.n, 1) + kColumnRows - 1) / kColumnRows +
            (groups + kColumnRows - 1) / kColumnRows;

    Scratch scratch(p.scratch);
    dec_lists = enc_lists = Lists::take(scratch, e);
    if (p.own_entries) enc_lists = Lists::take(scratch, p.enc_entries);
    group_by_latent = scratch.take<char>(
        std::max(group_by_latent_scratch(e), group_by_latent_scratch(p.enc_entries)));
    extra_rows = scratch.take<int32_t>(p.extra_latents ? e.d_sae : 0);
    shares = scratch.take<typename F::Bits>(groups * p.d_in);
    sums = scratch.take<A>(parts * p.d_out);
    g_b_dec = scratch.take<A>(p.d_out);
    squares = scratch.take<double>(groups);
    scale = scratch.take<A>(1);
    rate = scratch.take<AdamRate<A>>(1);
    gradients = scratch.take<typename F::Bits>(shared == row ? 0 : blocks * numbers);
    dec_segments = Segments<A>::take(scratch, e.capacity / kSegment, dec, pack);
    enc_segments = Segments<A>::take(scratch, p.enc_entries.capacity / kSegment, enc, pack);
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

template <Move kMove>
struct MoveConstant {
  static constexpr Move value = kMove;
};

// The arguments of the kernel for one code.
template <class F, class R>
AdamArgs<F, R> one_code(const AdamParams& p, const Plan<F, R>& plan, const ListsParams& enc,
                        const ListsParams& dec, const int32_t* extra_rows) {
  using Bits = typename F::Bits;
  return {Parameter<F>(p.W_enc),
          Parameter<F>(p.W_dec),
          Parameter<F>(p.b_enc),
          {dec},
          {enc},
          plan.dec_segments,
          plan.enc_segments,
          static_cast<const typename R::Bits*>(p.grad_rows),
          static_cast<const typename R::Bits*>(p.centered_rows),
          extra_rows,
          static_cast<const Bits*>(p.extra_W_enc),
          static_cast<const Bits*>(p.extra_W_dec),
          static_cast<const Bits*>(p.extra_b_enc),
          static_cast<const Bits*>(p.grad_b_enc),
          p.dec_entries.d_sae,
          p.d_in,
          p.d_in / (plan.wide ? F::kVector : 1),
          plan.dec.packs,
          plan.dec.chunks,
          Adam<typename F::Acc>(p.adam),
          plan.rate,
          nullptr,
          p.unit_norm,
          p.apply_b_dec ? plan.shares : nullptr,
          plan.squares,
          plan.shared ? nullptr : plan.gradients,
          p.bf16_W_enc,
          p.bf16_W_dec};
}

// The arguments of the kernel for sides that are unlike.
template <class F, class R>
AdamBySideArgs<F, R> by_side(const AdamParams& p, const Plan<F, R>& plan, const ListsParams& enc,
                             const ListsParams& dec, const int32_t* extra_rows) {
  using Bits = typename F::Bits;
  const auto side = [&](const ParameterParams& W, const ListsParams& lists,
                        const Segments<typename F::Acc>& segments, const void* gathered,
                        const void* extra, const void* more, int d, const Split& split,
                        uint16_t* copy) {
    return AdamSide<F, R>{Parameter<F>(W),
                          {lists},
                          segments,
                          static_cast<const typename R::Bits*>(gathered),
                          static_cast<const Bits*>(extra),
                          static_cast<const Bits*>(more),
                          d,
                          d / (plan.wide ? F::kVector : 1),
                          split.packs,
                          split.chunks,
                          copy};
  };
  return {side(p.W_enc, enc, plan.enc_segments, p.centered_rows, p.extra_W_enc, p.grad_W_enc,
               p.d_in, plan.enc, p.bf16_W_enc),
          side(p.W_dec, dec, plan.dec_segments, p.grad_rows, p.extra_W_dec, p.grad_W_dec, p.d_out,
               plan.dec, p.bf16_W_dec),
          Parameter<F>(p.b_enc),
          extra_rows,
          static_cast<const Bits*>(p.extra_b_enc),
          static_cast<const Bits*>(p.grad_b_enc),
          p.dec_entries.d_sae,
          Adam<typename F::Acc>(p.adam),
          plan.rate,
          nullptr,
          p.unit_norm,
          p.apply_b_dec ? plan.shares : nullptr,
          plan.squares,
          plan.shared ? nullptr : plan.gradients};
}

template <class F, class R, bool kWide, int kPacks, int kThreads>
const char* launch(const AdamParams& p, const Plan<F, R>& plan, cudaStream_t stream) {
  using A = typename F::Acc;
  const SparseActsParams& e = p.dec_entries;
  const Format format = sizeof(A) == 8 ? Format::kFloat64 : Format::kFloat32;
  const auto group = [&](const SparseActsParams& entries, const Lists& to) {
    return launch_group_by_latent({entries, to.offsets, to.rows, to.slots, plan.group_by_latent},
                                  format, stream);
  };
  if (const char* error = group(e, plan.dec_lists)) return error;
  if (p.own_entries) {
    if (const char* error = group(p.enc_entries, plan.enc_lists)) return error;
  }

  FASTSAE_LAUNCH(adam_rate_kernel<A>, 1, 32, 0, stream, p.lr, p.beta1, p.beta2, p.step, p.lr_at,
                 p.step_at, p.rounding_seed, plan.rate);

  int32_t* extra_rows = nullptr;
  if (p.extra_latents) {
    extra_rows = plan.extra_rows;
    cudaMemsetAsync(extra_rows, 0xff, static_cast<size_t>(e.d_sae) * 4, stream);  // -1
    FASTSAE_LAUNCH(extra_rows_kernel,
                   grid_of((p.extra_count + kColumnThreads - 1) / kColumnThreads), kColumnThreads,
                   0, stream, p.extra_latents, p.extra_count, e.d_sae, extra_rows);
  }

  const ListsParams dec = plan.dec_lists.of(e, e.values);
  const ListsParams enc = plan.enc_lists.of(p.enc_entries, p.enc_entries.values);
  launch_segments<R, kWide, kPacks>(dec, p.grad_rows, p.d_out, plan.dec, plan.dec_segments, stream);
  launch_segments<R, kWide, kPacks>(enc, p.centered_rows, p.d_in, plan.enc, plan.enc_segments,
                                    stream);

  const bool clips = !std::isinf(p.max_norm);
  A* scale = clips ? plan.scale : nullptr;
  AdamArgs<F, R> of_one_code = one_code(p, plan, enc, dec, extra_rows);
  AdamBySideArgs<F, R> of_sides = by_side(p, plan, enc, dec, extra_rows);
  const auto launch_rows = [&](auto move) {
    constexpr Move kMove = decltype(move)::value;
    if constexpr (kWide && std::is_same_v<F, Float32>) {
      if (plan.staged && (kMove == Move::kAdam || kMove == Move::kAdamBf16)) {
        const StagedLaunch how{plan.staged, kPacks, plan.groups,
                               staged_shared(p.d_in, p.d_out, p.bf16_averages), p.bf16_averages};
        return launch_adam_staged(of_sides, how, stream);
      }
    }
    if (p.by_side()) {
      launch_adam_by_side(
          of_sides,
          {kWide, kPacks, kWide && plan.large ? 512 : 128, plan.blocks, plan.shared, kMove},
          stream);
    } else {
      launch_adam<F, R, kWide, kPacks, kThreads, kMove>(of_one_code, plan, stream);
    }
  };

  const auto sum_b_dec = [&] {
    if (p.d_out == 0) return;
    const int64_t strips = (p.d_out + kColumnThreads - 1) / kColumnThreads;
    const auto parts = [](int64_t rows) { return (rows + kColumnRows - 1) / kColumnRows; };
    const auto add = [&](const A* x, int64_t rows, A* out) {
      if (rows == 0) return;
      FASTSAE_LAUNCH(column_sums_kernel<A>, grid_of(parts(rows) * strips), kColumnThreads, 0,
                     stream, x, rows, p.d_out, out);
    };
    const void* x = p.grad_b_dec ? p.grad_b_dec : p.grad_output;
    const int64_t rows = p.grad_b_dec ? 1 : e.n, groups = p.apply_b_dec ? plan.groups : 0;
    add(static_cast<const A*>(x), rows, plan.sums);
    add(reinterpret_cast<const A*>(plan.shares), groups, plan.sums + parts(rows) * p.d_out);
    FASTSAE_LAUNCH(last_column_sums_kernel<A>, grid_of((p.d_out + 31) / 32), 1024, 0, stream,
                   plan.sums, parts(rows) + parts(groups), p.d_out, plan.g_b_dec);
  };

  if (clips) {
    launch_rows(MoveConstant<Move::kNone>{});
    sum_b_dec();
    FASTSAE_LAUNCH(clip_kernel<A>, 1, 1024, 0, stream, plan.squares, plan.groups, plan.g_b_dec,
                   p.d_out, p.max_norm, p.clip, scale);
    of_one_code.scale = of_sides.scale = scale;
    of_one_code.shares = of_sides.shares = nullptr;
  }
  if (p.by_rows) launch_rows(MoveConstant<Move::kAdamMini>{});
  else if (!p.bf16_averages) launch_rows(MoveConstant<Move::kAdam>{});
  else if constexpr (std::is_same_v<F, Float32>) launch_rows(MoveConstant<Move::kAdamBf16>{});
  if (!clips) sum_b_dec();
  if (p.d_out > 0) {
    FASTSAE_LAUNCH(adam_vector_kernel<F>, grid_of((p.d_out + kColumnThreads - 1) / kColumnThreads),
                   kColumnThreads, 0, stream, Parameter<F>(p.b_dec), plan.g_b_dec, p.d_out, scale,
                   of_sides.adam, plan.rate);
  }
  return launch_error();
}

template <class F, class R>
const char* launch_format(const AdamParams& p, cudaStream_t stream) {
  const Plan<F, R> plan(p);
  const bool large = plan.large && !p.by_side();  // those by side are launched elsewhere
  if constexpr (std::is_same_v<F, R>) {
    if (!plan.wide && large) return launch<F, R, false, 4, 512>(p, plan, stream);
    if (!plan.wide) return launch<F, R, false, 4, 128>(p, plan, stream);
  }
  if (large) return launch<F, R, true, 4, 512>(p, plan, stream);
  const char* error = nullptr;
  with_packs(plan.enc.per_lane, [&](auto packs) {
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
