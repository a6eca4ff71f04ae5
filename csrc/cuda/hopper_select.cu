// Launches of the selection in a whole matrix within the product on Hopper.
//
// The product takes some columns of the matrix at a time, and its epilogue appends what is above
// the bound to the list of candidates. Between two of these products the list is tightened, which
// finds the bound: as many columns are taken as the list has room for, whatever their sums are. The
// first product has no bound yet, and gets few columns.
#include "cuda/hopper_select.h"

#include "cuda/block_select_args.cuh"
#include "cuda/hopper_append_kernel.cuh"
#include "cuda/hopper_product_launch.cuh"

namespace fastsae::cuda {
namespace {

// The first product's part of the columns, and for how many times the columns that gave a bound it
// serves: in random order, about as many times the capacity are appended.
constexpr int64_t kFirstPart = 32, kPerBound = 7;

BlockSelectParams in_tiles(const HopperSelectParams& p) {
  BlockSelectParams select = p.select;
  select.block_rows = select.n;
  select.block_columns = kTileColumns;
  select.in_product = true;
  return select;
}

// Tiles of a row that the next product takes: no more than there is room for.
int64_t next_tiles(const Blocks<Float32>& b, int64_t done) {
  const int64_t rest = b.tiles_per_row - done, products = (rest - 1) / b.between + 1;
  const int64_t wanted = done ? kPerBound * done : std::max<int64_t>(1, rest / kFirstPart);
  return std::min(wanted, (rest - 1) / products + 1);
}

}  // namespace

int64_t hopper_select_scratch(const HopperSelectParams& p) {
  return block_select_scratch(in_tiles(p), Format::kFloat32);
}

const char* launch_hopper_select(const HopperSelectParams& p, void* on) {
  const BlockSelectParams select = in_tiles(p);
  int64_t size;
  const Blocks<Float32> b = blocks_of<Float32>(select, &size);
  if (const char* error = launch_begin_blocks(select, Format::kFloat32, on)) return error;
  for (int64_t done = 0, tiles = 0; done < b.tiles_per_row; done += tiles) {
    if (done > 0) {
      const char* error = launch_tighten_blocks(select, select.n, Format::kFloat32, on);
      if (error) return error;
    }
    tiles = next_tiles(b, done);
    const int64_t first = done * kTileColumns;
    const int64_t columns = std::min(tiles * kTileColumns, select.m - first);
    const HopperProductParams part{p.x,
                                   static_cast<const char*>(p.W) + 2 * first * p.d,
                                   static_cast<int32_t>(select.n),
                                   static_cast<int32_t>(columns),
                                   p.d,
                                   nullptr,
                                   0};
    const AppendSums append{b.args, b.tiles_per_row, part.n, part.columns, static_cast<int>(first)};
    const char* error = launch_product_with(part, append, static_cast<cudaStream_t>(on));
    if (error) return error;
  }
  return launch_finish_blocks(select, Format::kFloat32, on);
}

}  // namespace fastsae::cuda
