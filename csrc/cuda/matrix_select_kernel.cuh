// The `cap` largest entries of a whole matrix [n, m] among those that take part, in one read of it.
//
// 1. A bound that somewhat more than `cap` entries exceed is guessed from a sample of the matrix:
// two
//    histograms of the leading digits of its keys. That takes some 10 us. A bound from an earlier
//    call would save them, and cost five reads whenever the matrix has moved on.
// 2. One read finds the entries above the bound. A block takes a tile of consecutive entries; the
//    hits of a tile are written next to each other, in order, wherever one atomic addition says,
//    and a directory says where each tile's are: what comes out does not depend on the order.
// 3. Histograms of 11-bit digits of their keys find the cap-th largest exactly.
// 4. Tiles count what they keep, and write it behind what the tiles before them keep. Among equal
//    values the first (row, column) stay.
// A guess that was too high or too low to be of use is noticed by every kernel after step 2; they
// read the matrix instead of the candidates then. Nothing is decided on the host. A matrix that is
// small, or of which much is kept, is read so from the start, without steps 1 and 2.
//
// Cost: one read of the matrix, about 6 bytes written and four times read per candidate (10 of
// float64), of which there are 1.2 to 2 times as many as are kept; integer atomics only. Of dense
// matrices four or five reads.
#pragma once

#include "cuda/block.cuh"
#include "cuda/matrix_select.h"
#include "cuda/number.cuh"

namespace fastsae::cuda {

using Count = unsigned long long;  // what atomicAdd calls 64 bits

constexpr int kSelectThreads = 256;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kSampleBits = 2 * kDigitBits;  // of a key in the sample

// Where the search for the cap-th largest key stands: it starts with `prefix` in the bits `known`,
// and is the need-th largest of those that do. kept == 0: no key is above or equal.
template <class Key>
struct Progress {
  Key prefix, known;
  Count need, kept;

  __device__ __forceinline__ bool above(Key key) const {
    return static_cast<Key>(key & known) > prefix;
  }
  __device__ __forceinline__ bool equal(Key key) const {
    return static_cast<Key>(key & known) == prefix;
  }
};

template <class F>
struct SelectArgs {
  using Bits = typename F::Bits;
  using Acc = typename F::Acc;
  using AccFormat = typename FormatOf<Acc>::type;
  using Key = typename AccFormat::Bits;

  static constexpr int kVector = F::kVector;
  static constexpr int kTile = 32768 / static_cast<int>(sizeof(Key));  // of filter_kernel
  // Digits that tell keys apart: the last bits of a 16-bit number's float key say nothing.
  static constexpr int kKeyBits = AccFormat::kBits;
  static constexpr int kPasses = sizeof(Bits) == 2 ? 2 : (kKeyBits + kDigitBits - 1) / kDigitBits;

  struct Header {  // zeroed before the first kernel
    Count candidates;
    Count guessed;  // the bound is above theta
    Progress<Key> sample;
    Progress<Key> progress[kPasses + 1];
    Count sample_histogram[2][kDigits];
    Count histogram[kPasses][kDigits];
  };

  const Bits* x;
  const Acc* bias;
  const bool* mask;
  const Acc* theta;
  const int32_t* tie_row;
  int64_t n, total;  // rows, entries
  int m;
  bool per_column, list;
  int64_t cap, first_row;
  Bits* values;
  int32_t* indices;
  int32_t* rows;
  int32_t* offsets;
  Acc* threshold;
  Acc* bound;

  // The matrix is cut into tiles, which `tile_lanes` lanes look at together. Without candidates
  // (dense) there are more of both, since every entry is looked at.
  bool dense;
  int tile, tile_lanes;
  int64_t tiles;
  int64_t sample_vectors;  // 0: no sample
  int64_t sample_rank;     // the bound is the sample's entry of this rank
  int64_t capacity;        // candidates; -1: the matrix is read
  Header* header;
  uint32_t* sample;      // [sample_vectors kVector] leading bits of keys
  Key* keys;             // [capacity]
  uint16_t* places;      // [capacity] in the tile
  uint32_t* tile_base;   // [tiles]
  uint32_t* tile_count;  // [tiles]
  uint32_t* tile_kept;   // [tiles] above the cap-th largest, and equal to it in the upper half
  Count* block_kept;     // [2, blocks] the same, of the tiles of a block

  __device__ static constexpr int width(int pass) {
    return kKeyBits - kDigitBits * pass < kDigitBits ? kKeyBits - kDigitBits * pass : kDigitBits;
  }
  __device__ static constexpr int shift(int pass) {
    return kKeyBits - kDigitBits * pass - width(pass);
  }

  __device__ __forceinline__ Acc lowest() const {
    if (per_column) return -static_cast<Acc>(__builtin_huge_val());
    return theta ? *theta : Acc(0);
  }
  // Whether what is known about the columns of a vector lies in aligned 16 bytes.
  __device__ __forceinline__ bool whole_columns() const {
    const auto address = reinterpret_cast<uintptr_t>(bias) | reinterpret_cast<uintptr_t>(theta);
    return m % kVector == 0 && (address & 15) == 0;
  }
  // The candidates are not what is looked for: kernels read the matrix.
  __device__ __forceinline__ bool reads_matrix() const {
    const int64_t found = static_cast<int64_t>(header->candidates);
    return found > capacity || (header->guessed && found < cap);
  }

  // The column of entry `local` of a tile whose first entry has column `first`.
  __device__ __forceinline__ int column(int first, int local) const {
    const unsigned c = static_cast<unsigned>(first) + static_cast<unsigned>(local);
    const unsigned width = static_cast<unsigned>(m);
    if (c < width) return static_cast<int>(c);
    return static_cast<int>(m >= tile ? c - width : c % width);
  }
};

// 16 bytes of x from entry i on, whatever the alignment; what lies past the end is NaN.
template <class F>
__device__ __forceinline__ uint4 load_entries(const typename F::Bits* x, int64_t i, int64_t total) {
  constexpr int E = F::kVector;
  constexpr typename F::Bits kNaN = static_cast<typename F::Bits>(~F::kSign);
  typename F::Bits parts[E];
#pragma unroll
  for (int e = 0; e < E; ++e) parts[e] = i + e < total ? x[i + e] : kNaN;
  uint4 v;
  memcpy(&v, parts, sizeof v);
  return v;
}

// per_column[c], per_column[c + 1], ..., going on at column 0; `whole`: these are aligned 16 bytes.
template <int E, class Acc>
__device__ __forceinline__ void load_columns(const Acc* per_column, int c, int m, bool whole,
                                             Acc (&out)[E]) {
  if (whole) {
    uint4 parts[E * sizeof(Acc) / 16];
#pragma unroll
    for (unsigned i = 0; i < E * sizeof(Acc) / 16; ++i) {
      parts[i] = load_shared_by_all(per_column + c + i * (16 / sizeof(Acc)));
    }
    memcpy(out, parts, sizeof out);
    return;
  }
#pragma unroll
  for (int e = 0; e < E; ++e) {
    out[e] = per_column[c];
    if (++c == m) c = 0;
  }
}

// What is known about the columns of a vector of entries.
template <class F>
struct VectorColumns {
  static constexpr int E = F::kVector;
  typename F::Acc bias[E] = {}, theta[E] = {};

  __device__ __forceinline__ void load(const SelectArgs<F>& a, int c, bool whole) {
    if (a.bias) load_columns<E>(a.bias, c, a.m, whole, bias);
    if (a.per_column) load_columns<E>(a.theta, c, a.m, whole, theta);
  }
};

// The numbers of a vector of entries, from entry i and column c on: NaN for those that take no
// part. With kColumns there is something to know about columns.
template <class F, bool kColumns>
__device__ __forceinline__ void entry_values(const SelectArgs<F>& a, const uint4& v,
                                             const VectorColumns<F>& columns, int64_t i, int c,
                                             typename F::Acc (&out)[F::kVector]) {
  using Acc = typename F::Acc;
  constexpr int E = F::kVector;
  constexpr Acc kNone = static_cast<Acc>(__builtin_nan(""));
#pragma unroll
  for (int e = 0; e < E; ++e) out[e] = F::widen(element<F>(v, e));
  if constexpr (kColumns) {
    if (a.bias) {
#pragma unroll
      for (int e = 0; e < E; ++e) out[e] += columns.bias[e];
    }
    if (a.per_column) {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        bool in = out[e] > columns.theta[e];
        if (!in && a.tie_row && out[e] == columns.theta[e]) {
          in = (i + e) / a.m <= a.tie_row[(c + e) % a.m];
        }
        if (!in) out[e] = kNone;
      }
    }
    if (a.mask) {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        if (!a.mask[c]) out[e] = kNone;
        if (++c == a.m) c = 0;
      }
    }
  }
}

// Whether a number of the vector is above the bound.
template <class F>
__device__ __forceinline__ bool any_above(const uint4& v, typename F::Acc bound) {
  if constexpr (F::kVector > 2) {
    const uint32_t most = F::larger(F::larger(v.x, v.y), F::larger(v.z, v.w));
    bool any = false;
#pragma unroll
    for (int e = 0; e < F::kVector / 4; ++e) any |= number<F>(most, e) > bound;
    return any;
  } else {
    return true;
  }
}

// The key of one entry, 0 if it takes no part.
template <class F, bool kColumns>
__device__ __forceinline__ typename SelectArgs<F>::Key entry_key(const SelectArgs<F>& a, int64_t i,
                                                                 int c, typename F::Acc lowest) {
  using AccFormat = typename SelectArgs<F>::AccFormat;
  typename F::Acc v = F::widen(a.x[i]);
  if constexpr (kColumns) {
    if (a.mask && !a.mask[c]) return 0;
    if (a.bias) v += a.bias[c];
    if (a.per_column) {
      const typename F::Acc theta = a.theta[c];
      if (!(v > theta) && !(a.tie_row && v == theta && i / a.m <= a.tie_row[c])) return 0;
    }
  }
  return v > lowest ? AccFormat::key(AccFormat::narrow(v)) : 0;
}

struct DigitSpace {
  Count sums[kSelectThreads / 32];
  Count rest;
  unsigned digit;
};

// Finds the digit that holds the need-th largest key (the last one if there are fewer), and how
// many are needed inside it: s.digit and s.rest; returns the number of keys. Nothing is found if
// there are none, or none is needed. Called by the whole block; ends with a barrier.
__device__ inline Count find_large_digit(const Count* histogram, Count need, DigitSpace& s) {
  constexpr int kOwn = kDigits / kSelectThreads;
  const int top = kDigits - 1 - kOwn * static_cast<int>(threadIdx.x);
  Count own = 0;
  for (int b = 0; b < kOwn; ++b) own += histogram[top - b];
  Count total;
  Count above = block_exclusive_sum<kSelectThreads>(own, s.sums, &total);
  if (need > total) need = total;
  if (above < need && need <= above + own) {  // one thread goes on
    int digit = top;
    for (; need > above + histogram[digit]; --digit) above += histogram[digit];
    s.digit = static_cast<unsigned>(digit);
    s.rest = need - above;
  }
  __syncthreads();  // found before everyone reads it
  return total;
}

// What is known before digit `pass`; the same in every block.
template <class F>
__device__ __forceinline__ Progress<typename SelectArgs<F>::Key> known_before(
    const SelectArgs<F>& a, int pass, DigitSpace& s) {
  using Key = typename SelectArgs<F>::Key;
  Progress<Key> p{0, 0, static_cast<Count>(a.cap), static_cast<Count>(a.cap)};
  if (pass == 0) return p;
  if (pass > 1) p = a.header->progress[pass - 1];
  const Count total = find_large_digit(a.header->histogram[pass - 1], p.need, s);
  if (pass == 1 && total < p.kept) p.kept = total;
  if (p.kept == 0) {
    p.prefix = p.known = static_cast<Key>(~Key(0));
  } else {
    const int shift = SelectArgs<F>::shift(pass - 1);
    p.prefix |= static_cast<Key>(s.digit) << shift;
    p.known |= ((Key(1) << SelectArgs<F>::width(pass - 1)) - 1) << shift;
    p.need = s.rest;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) a.header->progress[pass] = p;
  return p;
}

__device__ __forceinline__ void clear_digits(unsigned* histogram) {
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kSelectThreads) histogram[i] = 0;
  __syncthreads();  // zeroed before anyone counts
}
__device__ __forceinline__ void add_digits(const unsigned* histogram, Count* to) {
  __syncthreads();  // counted before the sums are passed on
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kSelectThreads) {
    if (histogram[i]) atomicAdd(&to[i], static_cast<Count>(histogram[i]));
  }
}

// ---- 1. the guess
// --------------------------------------------------------------------------------

// Keeps the leading bits of the keys of evenly spaced vectors of the matrix, and counts the first
// digit.
template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads) sample_kernel(SelectArgs<F> a) {
  using AccFormat = typename SelectArgs<F>::AccFormat;
  using Key = typename SelectArgs<F>::Key;
  constexpr int E = F::kVector;
  __shared__ unsigned histogram[kDigits];
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const typename F::Acc lowest = a.lowest();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  clear_digits(histogram);
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kSelectThreads; begin < a.sample_vectors;
       begin += stride) {
    const int64_t j = begin + threadIdx.x;
    const bool inside = j < a.sample_vectors;
    typename F::Acc value[E];
    if (inside) {
      const int64_t i = j * (a.total / E) / a.sample_vectors * E;
      const int c = kColumns ? static_cast<int>(i % a.m) : 0;
      VectorColumns<F> columns;
      if constexpr (kColumns) columns.load(a, c, a.whole_columns());
      entry_values<F, kColumns>(a, load_entries<F>(a.x, i, a.total), columns, i, c, value);
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      uint32_t code = 0;
      if (inside && value[e] > lowest) {
        const Key key = AccFormat::key(AccFormat::narrow(value[e]));
        code = static_cast<uint32_t>(key >> (AccFormat::kBits - kSampleBits));
      }
      if (inside) a.sample[j * E + e] = code;
      count_digit(histogram, code >> kDigitBits, inside, lane);
    }
  }
  add_digits(histogram, a.header->sample_histogram[0]);
}

// Counts the second digit of those that have the first one of the bound.
template <class F>
__global__ void __launch_bounds__(kSelectThreads) refine_sample_kernel(SelectArgs<F> a) {
  __shared__ unsigned histogram[kDigits];
  __shared__ DigitSpace space;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  const int64_t size = a.sample_vectors * F::kVector;
  find_large_digit(a.header->sample_histogram[0], static_cast<Count>(a.sample_rank), space);
  const unsigned digit = space.digit;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    a.header->sample.prefix = digit;
    a.header->sample.need = space.rest;
  }
  clear_digits(histogram);
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kSelectThreads; begin < size;
       begin += stride) {
    const int64_t j = begin + threadIdx.x;
    const uint32_t code = j < size ? a.sample[j] : 0;
    count_digit(histogram, code & (kDigits - 1), j < size && code >> kDigitBits == digit, lane);
  }
  add_digits(histogram, a.header->sample_histogram[1]);
}

// The bound of the filter; the same in every block.
template <class F>
__device__ __forceinline__ typename F::Acc guessed_bound(const SelectArgs<F>& a, DigitSpace& s) {
  using AccFormat = typename SelectArgs<F>::AccFormat;
  using Key = typename SelectArgs<F>::Key;
  using Acc = typename F::Acc;
  const Acc lowest = a.lowest();
  Acc guess = lowest;
  if (a.sample_vectors) {
    const Progress<Key> sample = a.header->sample;
    find_large_digit(a.header->sample_histogram[1], sample.need, s);
    const Key code = static_cast<Key>(sample.prefix << kDigitBits | s.digit);
    // Just below the smallest number with these leading bits.
    const Key key = static_cast<Key>(code << (AccFormat::kBits - kSampleBits));
    if (key > 0) guess = AccFormat::widen(AccFormat::from_key(static_cast<Key>(key - 1)));
  }
  const bool better = guess > lowest;
  if (blockIdx.x == 0 && threadIdx.x == 0) a.header->guessed = better;
  return better ? guess : lowest;
}

// ---- 2. the candidates
// ---------------------------------------------------------------------------

template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads, kColumns                       ? 3
                                                  : sizeof(typename F::Bits) > 2 ? 4
                                                                                 : 5)
    filter_kernel(SelectArgs<F> a) {
  using Acc = typename F::Acc;
  constexpr int E = F::kVector, kTile = SelectArgs<F>::kTile;
  constexpr int kVectors = kTile / (kSelectThreads * E);
  constexpr int kWords = kTile / 32;
  constexpr int kAtOnce = !kColumns ? kVectors : E >= 4 ? 2 : 1;  // as many as registers allow
  static_assert(kVectors % kAtOnce == 0);
  static_assert(kWords <= kSelectThreads);
  __shared__ unsigned hits[2][kWords];  // a bit for each entry of the tile; of two tiles
  __shared__ unsigned warp_sums[kSelectThreads / 32];
  __shared__ Count base;
  __shared__ DigitSpace space;
  const int tid = static_cast<int>(threadIdx.x);
  const Acc bound = guessed_bound(a, space), lowest = a.lowest();
  const bool is_aligned = (reinterpret_cast<uintptr_t>(a.x) & 15) == 0;
  const bool whole = kColumns && a.whole_columns();
  if (tid < kWords) hits[0][tid] = 0;
  __syncthreads();  // zeroed before the first hit

  int turn = 0;
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, turn ^= 1) {
    const int64_t start = tile * kTile;
    const int first = kColumns ? static_cast<int>(start % a.m) : 0;
    uint4 held[kVectors];
    if (is_aligned && start + kTile <= a.total) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        held[v] = load_once(a.x + start + (v * kSelectThreads + tid) * E);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        held[v] = load_entries<F>(a.x, start + (v * kSelectThreads + tid) * E, a.total);
      }
    }
#pragma unroll
    for (int begin = 0; begin < kVectors; begin += kAtOnce) {
      const auto local = [&](int v) { return (v * kSelectThreads + tid) * E; };
      // All on their way before one is waited for.
      VectorColumns<F> columns[kAtOnce];
#pragma unroll
      for (int v = 0; kColumns && v < kAtOnce; ++v) {
        columns[v].load(a, a.column(first, local(begin + v)), whole);
      }
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const uint4& entries = held[begin + v];
        if (!kColumns && !any_above<F>(entries, bound)) continue;
        const int at = local(begin + v);
        Acc value[E];
        entry_values<F, kColumns>(a, entries, columns[v], start + at,
                                  kColumns ? a.column(first, at) : 0, value);
        unsigned found = 0;
#pragma unroll
        for (int e = 0; e < E; ++e) found |= (value[e] > bound ? 1u : 0u) << e;
        if (found) atomicOr(&hits[turn][at / 32], found << (at % 32));
      }
    }
    __syncthreads();                            // all hits are there
    if (tid < kWords) hits[turn ^ 1][tid] = 0;  // those of the tile before
    unsigned word = tid < kWords ? hits[turn][tid] : 0;
    unsigned count;
    const unsigned before =
        block_exclusive_sum<kSelectThreads>(static_cast<unsigned>(__popc(word)), warp_sums, &count);
    if (tid == 0) {
      base = atomicAdd(&a.header->candidates, static_cast<Count>(count));
      a.tile_base[tile] = static_cast<uint32_t>(base);
      a.tile_count[tile] = count;
    }
    __syncthreads();  // the place of the tile's candidates is known
    if (base + count > static_cast<Count>(a.capacity)) word = 0;
    // They were read a moment ago: this is not another read of the memory.
    for (Count to = base + before; word; word &= word - 1) {
      const int local = 32 * tid + __ffs(static_cast<int>(word)) - 1;
      a.keys[to] =
          entry_key<F, kColumns>(a, start + local, kColumns ? a.column(first, local) : 0, lowest);
      a.places[to++] = static_cast<uint16_t>(local);
    }
  }
}

// ---- 3. the cap-th largest
// -----------------------------------------------------------------------

template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads, 4) digit_kernel(SelectArgs<F> a, int pass) {
  using Key = typename SelectArgs<F>::Key;
  __shared__ unsigned histogram[kDigits];
  __shared__ DigitSpace space;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31;
  const Progress<Key> known = known_before(a, pass, space);
  const int shift = SelectArgs<F>::shift(pass);
  const unsigned digits = (1u << SelectArgs<F>::width(pass)) - 1u;
  clear_digits(histogram);
  const auto count = [&](Key key) {
    count_digit(histogram, static_cast<unsigned>(key >> shift) & digits,
                key != 0 && known.equal(key), lane);
  };
  if (a.reads_matrix()) {
    const typename F::Acc lowest = a.lowest();
    for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
      const int64_t start = tile * a.tile;
      const int first = static_cast<int>(start % a.m);
      for (int j = tid; j < a.tile; j += kSelectThreads) {
        count(start + j < a.total ? entry_key<F, kColumns>(a, start + j, a.column(first, j), lowest)
                                  : Key(0));
      }
    }
  } else {
    const int64_t size = static_cast<int64_t>(a.header->candidates);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kSelectThreads;
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kSelectThreads; begin < size;
         begin += stride) {
      count(begin + tid < size ? a.keys[begin + tid] : Key(0));
    }
  }
  add_digits(histogram, a.header->histogram[pass]);
}

// ---- 4. the result
// -------------------------------------------------------------------------------

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
  const int64_t each = (a.tiles + gridDim.x - 1) / gridDim.x;
  const int64_t begin = min(a.tiles, each * blockIdx.x);
  return {begin, min(a.tiles, begin + each)};
}

// Calls f(key, place in the tile) for the candidates of a tile in ascending order, a lane of the
// group for each; key 0 where there is none. Called by whole warps; lanes of a group name the same
// tile, and `tile` may be past the end.
template <class F, bool kColumns, class Call>
__device__ __forceinline__ void for_each_in_tile(const SelectArgs<F>& a, const TileGroup& group,
                                                 int64_t tile, int64_t end, bool whole, Call&& f) {
  using Key = typename SelectArgs<F>::Key;
  const int64_t start = tile * a.tile;
  int size = 0, first = 0;
  uint32_t base = 0;
  if (tile < end) {
    if (whole) {
      size = static_cast<int>(min(int64_t{a.tile}, a.total - start));
      first = static_cast<int>(start % a.m);
    } else {
      size = static_cast<int>(a.tile_count[tile]);
      base = a.tile_base[tile];
    }
  }
  const typename F::Acc lowest = whole ? a.lowest() : typename F::Acc(0);
  const int most = __reduce_max_sync(kFullWarp, size);
  for (int next = 0; next < most; next += group.lanes) {
    const int i = next + group.lane;
    Key key = 0;
    int place = i;
    if (i < size && whole) {
      key = entry_key<F, kColumns>(a, start + i, a.column(first, i), lowest);
    } else if (i < size) {
      key = a.keys[base + i];
      place = a.places[base + i];
    }
    f(key, place);
  }
}

template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads, 4) count_kernel(SelectArgs<F> a) {
  using Key = typename SelectArgs<F>::Key;
  __shared__ DigitSpace space;
  __shared__ Count warp_sums[2][kSelectThreads / 32];
  const TileGroup group(a.tile_lanes);
  const Progress<Key> known = known_before(a, SelectArgs<F>::kPasses, space);
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
      a.tile_kept[tile] = above_here | equal_here << 16;
      above += above_here;
      equal += equal_here;
    }
  }
  above = block_sum<kSelectThreads>(above, warp_sums[0]);
  equal = block_sum<kSelectThreads>(equal, warp_sums[1]);
  if (threadIdx.x == 0) {
    a.block_kept[2 * blockIdx.x] = above;
    a.block_kept[2 * blockIdx.x + 1] = equal;
  }
}

// With the grid of count_kernel.
template <class F, bool kColumns>
__global__ void __launch_bounds__(kSelectThreads, 3) write_kernel(SelectArgs<F> a) {
  using AccFormat = typename SelectArgs<F>::AccFormat;
  using Key = typename SelectArgs<F>::Key;
  __shared__ Count sums[2][kSelectThreads / 32];
  __shared__ unsigned starts[2][kSelectThreads];
  __shared__ unsigned warp_sums[2][kSelectThreads / 32];
  const int tid = static_cast<int>(threadIdx.x);
  const TileGroup group(a.tile_lanes);
  const unsigned lower_lanes = (1u << (tid & 31)) - 1u;
  const Progress<Key> known = a.header->progress[SelectArgs<F>::kPasses];
  const bool whole = a.reads_matrix();
  const TileRange tiles = tiles_of_block(a);

  Count above = 0, equal = 0;  // before this block
  for (unsigned b = threadIdx.x; b < blockIdx.x; b += kSelectThreads) {
    above += a.block_kept[2 * b];
    equal += a.block_kept[2 * b + 1];
  }
  above = block_sum<kSelectThreads>(above, sums[0]);
  equal = block_sum<kSelectThreads>(equal, sums[1]);

  for (int64_t begin = tiles.begin; begin < tiles.end; begin += kSelectThreads) {
    const uint32_t kept = begin + tid < tiles.end ? a.tile_kept[begin + tid] : 0;
    unsigned above_here, equal_here;
    starts[0][tid] = block_exclusive_sum<kSelectThreads>(kept & 0xffffu, warp_sums[0], &above_here);
    starts[1][tid] = block_exclusive_sum<kSelectThreads>(kept >> 16, warp_sums[1], &equal_here);
    __syncthreads();  // every tile knows what comes before it
    const int here = static_cast<int>(min(int64_t{kSelectThreads}, tiles.end - begin));
    for (int part = 0; part < here; part += group.tiles_at_once()) {
      const int place_in_part = part + group.tile;
      const int64_t tile = begin + place_in_part;
      const int64_t start = tile * a.tile;
      Count above_before = above + starts[0][place_in_part];
      Count equal_before = equal + starts[1][place_in_part];
      for_each_in_tile<F, kColumns>(a, group, tile, tiles.end, whole, [&](Key key, int place) {
        const bool is_above = key != 0 && known.above(key);
        const bool is_equal = key != 0 && known.equal(key);
        const unsigned aboves = __ballot_sync(kFullWarp, is_above) & group.mask;
        const unsigned equals = __ballot_sync(kFullWarp, is_equal) & group.mask;
        const Count rank = equal_before + static_cast<unsigned>(__popc(equals & lower_lanes));
        if (is_above || (is_equal && rank < known.need)) {
          const Count to = above_before + static_cast<unsigned>(__popc(aboves & lower_lanes)) +
                           (rank < known.need ? rank : known.need);
          const int64_t i = start + place;
          const int64_t row = i / a.m;
          const int32_t c = static_cast<int32_t>(i - row * a.m);
          typename F::Acc value = AccFormat::widen(AccFormat::from_key(key));
          if (value == 0) {  // the key has forgotten its sign
            value = F::widen(a.x[i]);
            if (kColumns && a.bias) value += a.bias[c];
          }
          a.values[to] = F::narrow(value);
          a.indices[to] = c;
          a.rows[to] = static_cast<int32_t>(a.first_row + row);
        }
        above_before += static_cast<unsigned>(__popc(aboves));
        equal_before += static_cast<unsigned>(__popc(equals));
      });
    }
    above += above_here;
    equal += equal_here;
    __syncthreads();  // read before the next tiles overwrite it
  }
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

template <class F>
__global__ void __launch_bounds__(kSelectThreads) finish_kernel(SelectArgs<F> a) {
  using AccFormat = typename SelectArgs<F>::AccFormat;
  using Key = typename SelectArgs<F>::Key;
  using Acc = typename F::Acc;
  const Progress<Key> known = a.header->progress[SelectArgs<F>::kPasses];
  const int64_t kept = static_cast<int64_t>(known.kept);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  if (a.offsets) {
    for (int64_t r = thread; r <= a.n; r += threads) {
      a.offsets[r] = entries_before(a.rows, kept, a.first_row + r);
    }
  }
  const typename F::Bits padding =
      a.list ? F::narrow(static_cast<Acc>(__builtin_nan(""))) : typename F::Bits(0);
  for (int64_t j = kept + thread; j < a.cap; j += threads) {
    a.values[j] = padding;
    a.indices[j] = 0;
    a.rows[j] = 0x7fffffff;
  }
  if (thread != 0) return;
  Acc smallest = static_cast<Acc>(__builtin_huge_val());
  if (kept > 0) {
    const Key rest = known.prefix & AccFormat::kSign ? Key(0) : static_cast<Key>(~known.known);
    smallest = AccFormat::widen(AccFormat::from_key(static_cast<Key>(known.prefix | rest)));
  }
  if (a.threshold) *a.threshold = smallest;
  if (a.bound) *a.bound = kept == a.cap ? smallest : a.lowest();
}

// ---- selections of several matrices
// --------------------------------------------------------------

// The columns and rows of a selection from a list; its values are merged already.
__global__ void __launch_bounds__(kSelectThreads)
    gather_entries_kernel(const int32_t* columns, const int32_t* rows, const int32_t* chosen,
                          const int32_t* half, int64_t cap, int32_t* merged_columns,
                          int32_t* merged_rows) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; j < cap;
       j += threads) {
    const bool padding = half[j] == 0x7fffffff;
    const int64_t from = padding ? 0 : half[j] * cap + chosen[j];
    merged_columns[j] = padding ? 0 : columns[from];
    merged_rows[j] = padding ? 0x7fffffff : rows[from];
  }
}

template <class F>
__global__ void __launch_bounds__(kSelectThreads)
    finish_list_kernel(typename F::Bits* values, const int32_t* rows, int64_t cap, int64_t n,
                       int32_t* offsets) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t r = thread; r <= n; r += threads) offsets[r] = entries_before(rows, cap, r);
  for (int64_t j = thread; j < cap; j += threads) {
    if (rows[j] == 0x7fffffff) values[j] = 0;
  }
}

}  // namespace fastsae::cuda
