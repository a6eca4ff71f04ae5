// A selection from a matrix that is met a block at a time: how its scratch is laid out, for its
// launchers.
#pragma once

#include <algorithm>

#include "cuda/block_select_kernel.cuh"

namespace fastsae::cuda {

// Candidates, for each that is kept, that are worth a tightening, and the memory for all entries of
// some blocks, or of a product. Little in the emulation, so that small matrices are tightened.
#ifdef FASTSAE_EMULATED
constexpr int64_t kTightenAt = 1, kTightenSlack = 16;
constexpr int64_t kRoomBytes = 1 << 15, kProductRoomBytes = 1 << 15;
#else
constexpr int64_t kTightenAt = 4, kTightenSlack = 4096;
constexpr int64_t kRoomBytes = int64_t{1} << 28, kProductRoomBytes = int64_t{1} << 29;
#endif

inline unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(
      std::max<int64_t>(1, std::min<int64_t>(items, 6 * multiprocessors())));
}
inline unsigned blocks_of_threads(int64_t items) {
  return blocks_for((items + kSelectThreads - 1) / kSelectThreads);
}

template <class F>
struct Blocks {
  SelectArgs<F> args;
  Candidates<KeyOf<F>> kept;
  int64_t tiles_per_row, tighten_at;
  int64_t between;  // blocks that there is room for: after so many, candidates are tightened
};

template <class F>
Blocks<F> blocks_of(const BlockSelectParams& p, int64_t* scratch_size) {
  using Args = SelectArgs<F>;
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  using Key = KeyOf<F>;
  Blocks<F> b{};
  b.tiles_per_row = (int64_t{p.m} + p.block_columns - 1) / p.block_columns;
  // No more than leaves the places of all candidates 32 bits.
  b.tighten_at = std::min(kTightenAt * p.capacity + kTightenSlack, int64_t{1} << 31);
  const int64_t entries = p.block_rows * p.block_columns;
  const int64_t bytes = entries * static_cast<int64_t>(sizeof(Key) + sizeof(uint16_t));
  b.between = std::max<int64_t>(1, (p.in_product ? kProductRoomBytes : kRoomBytes) / bytes);
  const int64_t room = std::min(p.n * p.m, b.tighten_at + b.between * entries);

  // The choice sees rows of whole tiles, in which a tile is what a block has of a row.
  Args& a = b.args;
  const int64_t padded = b.tiles_per_row * p.block_columns;
  a.in = {nullptr,      static_cast<const Acc*>(p.bias),
          p.mask,       static_cast<const Acc*>(p.threshold),
          nullptr,      p.n,
          p.n * padded, static_cast<int>(padded),
          p.per_column};
  a.out = {p.capacity, 0,         static_cast<Bits*>(p.values),  p.indices,
           nullptr,    p.offsets, static_cast<Acc*>(p.smallest), nullptr,
           false};
  a.plan = {false, p.block_columns, p.in_product ? 2 : 8, p.n * b.tiles_per_row, 0, 0};
  Scratch scratch(p.scratch);
  a.scratch.header = scratch.take<typename Args::Header>(1);
  a.candidates = {room, scratch.take<Key>(room), scratch.take<uint16_t>(room),
                  scratch.take<uint32_t>(a.plan.tiles), scratch.take<uint32_t>(a.plan.tiles)};
  b.kept = {p.capacity, scratch.take<Key>(p.capacity), scratch.take<uint16_t>(p.capacity), nullptr,
            nullptr};
  a.scratch.tile_kept = scratch.take<uint32_t>(a.plan.tiles);
  a.scratch.block_kept = scratch.take<Count>(2 * int64_t{blocks_for(a.plan.tiles)});
  a.out.rows = scratch.take<int32_t>(p.capacity);
  *scratch_size = scratch.size();
  return b;
}

}  // namespace fastsae::cuda
