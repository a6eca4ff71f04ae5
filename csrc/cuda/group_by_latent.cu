// Launches of the group_by_latent kernels. No torch header.
#include "cuda/group_by_latent.h"

#include <algorithm>

#include "cuda/group_by_latent_kernel.cuh"

namespace fastsae::cuda {
namespace {

// Buffers of a sort, and how it is cut.
struct Sort {
  int passes, bits;  // of one pass
  int blocks, per_block;
  uint32_t* keys[2];
  int32_t* slots[2];
  unsigned *table, *totals;
  int64_t bytes;

  Sort(const SparseActsParams& e, void* memory) {
    int width = 1;  // bits of the largest key, d_sae
    while (width < 31 && e.d_sae >> width) ++width;
    passes = (width + kMostBits - 1) / kMostBits;
    bits = (width + passes - 1) / passes;
    const int64_t tiles = (int64_t{e.capacity} + kTile - 1) / kTile;
    const int64_t of_block =
        std::max<int64_t>(1, (tiles + 4 * multiprocessors() - 1) / (4 * multiprocessors()));
    blocks = static_cast<int>((tiles + of_block - 1) / of_block);
    per_block = static_cast<int>(of_block * kTile);
    Scratch scratch(memory);
    for (uint32_t*& k : keys) k = scratch.take<uint32_t>(e.capacity);
    for (int32_t*& s : slots) s = scratch.take<int32_t>(e.capacity);
    table = scratch.take<unsigned>(int64_t{blocks} << bits);
    totals = scratch.take<unsigned>(int64_t{1} << bits);
    bytes = scratch.size();
  }
};

template <class F>
void launch(const GroupByLatentParams& p, cudaStream_t stream) {
  const SparseActsParams& e = p.entries;
  const Sort sort(e, p.scratch);
  const unsigned blocks = static_cast<unsigned>(sort.blocks);
  for (int i = 0; e.capacity > 0 && i < sort.passes; ++i) {
    const SortPass pass{e.capacity, sort.per_block, i * sort.bits, 1 << sort.bits};
    const int from = i & 1, to = from ^ 1;
    if (i == 0) {
      FASTSAE_LAUNCH(first_count_kernel<F>, blocks, kSortThreads, 0, stream, SparseActsView<F>{e},
                     pass, sort.keys[from], sort.table);
    } else {
      FASTSAE_LAUNCH(count_kernel, blocks, kSortThreads, 0, stream, pass, sort.keys[from],
                     sort.table);
    }
    FASTSAE_LAUNCH(scan_kernel, static_cast<unsigned>((pass.bins + kSortWarps - 1) / kSortWarps),
                   kSortThreads, 0, stream, pass.bins, sort.blocks, sort.table, sort.totals);
    FASTSAE_LAUNCH(scatter_kernel, blocks, kSortThreads, 0, stream, pass, sort.keys[from],
                   i == 0 ? nullptr : sort.slots[from], sort.table, sort.totals, sort.keys[to],
                   sort.slots[to]);
  }
  const int64_t longest = std::max<int64_t>(e.capacity, int64_t{e.d_sae} + 1);
  const int last = sort.passes & 1;
  FASTSAE_LAUNCH(lists_kernel<F>, grid_of((longest + kSortThreads - 1) / kSortThreads),
                 kSortThreads, 0, stream, SparseActsView<F>{e}, sort.keys[last], sort.slots[last],
                 p.offsets, p.rows, p.slots);
}

}  // namespace

int64_t group_by_latent_scratch(const SparseActsParams& entries) {
  return Sort(entries, nullptr).bytes;
}

const char* launch_group_by_latent(const GroupByLatentParams& params, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  with_format(format, [&](auto f) { launch<decltype(f)>(params, on); });
  return launch_error();
}

}  // namespace fastsae::cuda
