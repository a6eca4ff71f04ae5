// Stage 3 of a selection in a whole matrix: the largest of the candidates, or of the matrix where
// the candidates are not what is looked for.
#pragma once

#include "cuda/matrix_select_args.cuh"

namespace fastsae::cuda {

// ---- the capacity-th largest key ----

// Counts digit `pass` of the keys that have all digits before it.
template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads, 4) digit_kernel(SelectArgs<F> a, int pass) {
  using Key = KeyOf<F>;
  __shared__ unsigned histogram[kDigits];
  __shared__ DigitSpace space;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31;
  if (a.is_idle()) return;
  const Progress<Key> known =
      known_before<F>(a.scratch.header->search, static_cast<Count>(a.out.capacity), pass, space);
  const int shift = KeyDigits<F>::shift(pass);
  const unsigned digits = (1u << KeyDigits<F>::width(pass)) - 1u;
  clear_digits(histogram);
  const auto count = [&](Key key) {
    count_digit(histogram, static_cast<unsigned>(key >> shift) & digits,
                key != 0 && known.equal(key), lane);
  };
  if (a.reads_matrix()) {
    const typename F::Acc threshold = a.in.common_threshold();
    for (int64_t tile = blockIdx.x; tile < a.plan.tiles; tile += gridDim.x) {
      const int64_t start = tile * a.plan.tile;
      const int first = static_cast<int>(start % a.in.m);
      for (int j = tid; j < a.plan.tile; j += kSelectThreads) {
        count(start + j < a.in.total
                  ? entry_key<F, kColumns>(a.in, start + j, a.column(first, j), threshold)
                  : Key(0));
      }
    }
  } else {
    const int64_t size = static_cast<int64_t>(a.scratch.header->candidates);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kSelectThreads; begin < size;
         begin += stride) {
      count(begin + tid < size ? a.candidates.keys[begin + tid] : Key(0));
    }
  }
  add_digits(histogram, a.scratch.header->search.histogram[pass]);
}

// ---- the result ----

// Where a thread stands among those that look at the same tile.
struct TileGroup {
  int lanes, lane, tile;  // tile: of the kSelectThreads / lanes that a block looks at
  unsigned mask;          // of the group, in its warp

  __device__ __forceinline__ explicit TileGroup(int lanes)
      : lanes(lanes),
        lane(static_cast<int>(threadIdx.x) & (lanes - 1)),
        tile(static_cast<int>(threadIdx.x) / lanes),
        mask((kFullWarp >> (32 - lanes)) << ((threadIdx.x & 31) - static_cast<unsigned>(lane))) {}

  __device__ __forceinline__ int tiles_at_once() const { return kSelectThreads / lanes; }
};

// The tiles of a block: consecutive ones.
struct TileRange {
  int64_t begin, end;
};
template <class F>
__device__ __forceinline__ TileRange tiles_of_block(const SelectArgs<F>& a) {
  const int64_t each = (a.plan.tiles + gridDim.x - 1) / gridDim.x;
  const int64_t begin = min(a.plan.tiles, each * blockIdx.x);
  return {begin, min(a.plan.tiles, begin + each)};
}

// Calls f(key, place in the tile) for the candidates of a tile in ascending order, a lane of the
// group for each; key 0 where there is none. Called by whole warps; lanes of a group name the same
// tile, and `tile` may be past the end.
template <class F, bool kColumns, class Call>
__device__ __forceinline__ void for_each_in_tile(const SelectArgs<F>& a, const TileGroup& group,
                                                 int64_t tile, int64_t end, bool whole, Call&& f) {
  using Key = KeyOf<F>;
  const int64_t start = tile * a.plan.tile;
  int size = 0, first = 0;
  uint32_t base = 0;
  if (tile < end) {
    if (whole) {
      size = static_cast<int>(min(int64_t{a.plan.tile}, a.in.total - start));
      first = static_cast<int>(start % a.in.m);
    } else {
      size = static_cast<int>(a.candidates.tile_count[tile]);
      base = a.candidates.tile_base[tile];
    }
  }
  const typename F::Acc threshold = whole ? a.in.common_threshold() : typename F::Acc(0);
  const int longest = __reduce_max_sync(kFullWarp, size);
  for (int next = 0; next < longest; next += group.lanes) {
    const int i = next + group.lane;
    Key key = 0;
    int place = i;
    if (i < size && whole) {
      key = entry_key<F, kColumns>(a.in, start + i, a.column(first, i), threshold);
    } else if (i < size) {
      key = a.candidates.keys[base + i];
      place = a.candidates.places[base + i];
    }
    f(key, place);
  }
}

// Counts, for every tile and for every block, the entries that are above the capacity-th largest
// key and those that equal it.
template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads, 4) count_kernel(SelectArgs<F> a) {
  using Key = KeyOf<F>;
  __shared__ DigitSpace space;
  __shared__ Count warp_sums[2][kSelectThreads / 32];
  if (a.is_idle()) return;
  const TileGroup group(a.plan.tile_lanes);
  const Progress<Key> known = known_before<F>(
      a.scratch.header->search, static_cast<Count>(a.out.capacity), KeyDigits<F>::kPasses, space);
  const bool whole = a.reads_matrix();
  const TileRange tiles = tiles_of_block(a);
  Count above = 0, equal = 0;  // of the first lane of every group
  for (int64_t begin = tiles.begin; begin < tiles.end; begin += group.tiles_at_once()) {
    const int64_t tile = begin + group.tile;
    unsigned above_here = 0, equal_here = 0;
    for_each_in_tile<F, kColumns>(a, group, tile, tiles.end, whole, [&](Key key, int) {
      above_here += static_cast<unsigned>(
          __popc(__ballot_sync(kFullWarp, key != 0 && known.above(key)) & group.mask));
      equal_here += static_cast<unsigned>(
          __popc(__ballot_sync(kFullWarp, key != 0 && known.equal(key)) & group.mask));
    });
    if (tile < tiles.end && group.lane == 0) {
      a.scratch.tile_kept[tile] = above_here | equal_here << 16;
      above += above_here;
      equal += equal_here;
    }
  }
  above = block_sum<kSelectThreads>(above, warp_sums[0]);
  equal = block_sum<kSelectThreads>(equal, warp_sums[1]);
  if (threadIdx.x == 0) {
    a.scratch.block_kept[2 * blockIdx.x] = above;
    a.scratch.block_kept[2 * blockIdx.x + 1] = equal;
  }
}

struct KeptSpace {
  Count sums[2][kSelectThreads / 32];
  unsigned starts[2][kSelectThreads];
  unsigned warp_sums[2][kSelectThreads / 32];
};

// Calls put(to, tile, place in the tile, key) for what is kept; `to` comes after what the blocks
// and tiles before keep. Then, by one lane for each tile, done(tile, its first `to`, how many).
// With the grid of count_kernel.
template <class F, bool kColumns, class Put, class Done>
__device__ __forceinline__ void for_each_kept(const SelectArgs<F>& a, KeptSpace& s, Put&& put,
                                              Done&& done) {
  using Key = KeyOf<F>;
  const int tid = static_cast<int>(threadIdx.x);
  const TileGroup group(a.plan.tile_lanes);
  const unsigned lower_lanes = (1u << (tid & 31)) - 1u;
  const Progress<Key> known = a.scratch.header->search.progress[KeyDigits<F>::kPasses];
  const bool whole = a.reads_matrix();
  const TileRange tiles = tiles_of_block(a);
  // Of those that are equal to the smallest, the first ones.
  const auto least = [&](Count equal) { return equal < known.need ? equal : known.need; };

  Count above = 0, equal = 0;  // before this block
  for (unsigned b = threadIdx.x; b < blockIdx.x; b += kSelectThreads) {
    above += a.scratch.block_kept[2 * b];
    equal += a.scratch.block_kept[2 * b + 1];
  }
  above = block_sum<kSelectThreads>(above, s.sums[0]);
  equal = block_sum<kSelectThreads>(equal, s.sums[1]);

  for (int64_t begin = tiles.begin; begin < tiles.end; begin += kSelectThreads) {
    const uint32_t kept = begin + tid < tiles.end ? a.scratch.tile_kept[begin + tid] : 0;
    unsigned above_here, equal_here;
    s.starts[0][tid] =
        block_exclusive_sum<kSelectThreads>(kept & 0xffffu, s.warp_sums[0], &above_here);
    s.starts[1][tid] = block_exclusive_sum<kSelectThreads>(kept >> 16, s.warp_sums[1], &equal_here);
    __syncthreads();  // every tile knows what comes before it
    const int here = static_cast<int>(min(int64_t{kSelectThreads}, tiles.end - begin));
    for (int part = 0; part < here; part += group.tiles_at_once()) {
      const int place_in_part = part + group.tile;
      const int64_t tile = begin + place_in_part;
      Count above_before = above + s.starts[0][place_in_part];
      Count equal_before = equal + s.starts[1][place_in_part];
      const Count first = above_before + least(equal_before);
      for_each_in_tile<F, kColumns>(a, group, tile, tiles.end, whole, [&](Key key, int place) {
        const bool is_above = key != 0 && known.above(key);
        const bool is_equal = key != 0 && known.equal(key);
        const unsigned aboves = __ballot_sync(kFullWarp, is_above) & group.mask;
        const unsigned equals = __ballot_sync(kFullWarp, is_equal) & group.mask;
        const Count rank = equal_before + static_cast<unsigned>(__popc(equals & lower_lanes));
        if (is_above || (is_equal && rank < known.need)) {
          put(above_before + static_cast<unsigned>(__popc(aboves & lower_lanes)) + least(rank),
              tile, place, key);
        }
        above_before += static_cast<unsigned>(__popc(aboves));
        equal_before += static_cast<unsigned>(__popc(equals));
      });
      __syncwarp();  // the directory is read before it may be overwritten
      if (group.lane == 0 && tile < tiles.end) {
        done(tile, first, static_cast<unsigned>(above_before + least(equal_before) - first));
      }
    }
    above += above_here;
    equal += equal_here;
    __syncthreads();  // read before the next tiles overwrite it
  }
}

// Writes what is kept.
template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads, 3) write_kernel(SelectArgs<F> a) {
  using AccFormat = AccFormatOf<F>;
  using Key = KeyOf<F>;
  __shared__ KeptSpace space;
  const auto put = [&](Count to, int64_t tile, int place, Key key) {
    const int64_t i = tile * a.plan.tile + place;
    const int64_t row = i / a.in.m;
    const int32_t c = static_cast<int32_t>(i - row * a.in.m);
    typename F::Acc value = AccFormat::widen(AccFormat::from_key(key));
    if (value == 0 && a.in.bits) {  // the key has forgotten its sign
      value = F::widen(a.in.bits[i]);
      if (kColumns && a.in.bias) value += a.in.bias[c];
    }
    a.out.values[to] = F::narrow(value);
    a.out.indices[to] = c;
    a.out.rows[to] = static_cast<int32_t>(a.out.first_row + row);
  };
  for_each_kept<F, kColumns>(a, space, put, [](int64_t, Count, unsigned) {});
}

// offsets[r], r <= n: how many of the ascending `rows` are below first_row + r.
__device__ __forceinline__ int32_t entries_before(const int32_t* rows, int64_t kept, int64_t row) {
  int64_t low = 0, high = kept;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (rows[middle] < row) low = middle + 1;
    else high = middle;
  }
  return static_cast<int32_t>(low);
}

// Writes the offsets, the padding, and what later calls need to know.
template <class F>
__global__ void __launch_bounds__(kSelectThreads) finish_kernel(SelectArgs<F> a) {
  using AccFormat = AccFormatOf<F>;
  using Key = KeyOf<F>;
  using Acc = typename F::Acc;
  const Progress<Key> known = a.scratch.header->search.progress[KeyDigits<F>::kPasses];
  const int64_t kept = static_cast<int64_t>(known.kept_count);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  if (a.out.offsets) {
    for (int64_t r = thread; r <= a.in.n; r += threads) {
      a.out.offsets[r] = entries_before(a.out.rows, kept, a.out.first_row + r);
    }
  }
  const typename F::Bits padding =
      a.out.list ? F::narrow(static_cast<Acc>(__builtin_nan(""))) : typename F::Bits(0);
  for (int64_t j = kept + thread; j < a.out.capacity; j += threads) {
    a.out.values[j] = padding;
    a.out.indices[j] = 0;
    a.out.rows[j] = 0x7fffffff;
  }
  if (thread != 0) return;
  Acc smallest = static_cast<Acc>(__builtin_huge_val());
  if (kept > 0) {
    const Key rest =
        known.prefix & AccFormat::kSign ? Key(0) : static_cast<Key>(~known.prefix_mask);
    smallest = AccFormat::widen(AccFormat::from_key(static_cast<Key>(known.prefix | rest)));
  }
  if (a.out.smallest) *a.out.smallest = smallest;
  if (a.out.lower_bound)
    *a.out.lower_bound = kept == a.out.capacity ? smallest : a.in.common_threshold();
}

}  // namespace fastsae::cuda
