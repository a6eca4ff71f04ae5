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
  int64_t buffer, table;  // bytes

  explicit Sort(const EntriesParams& e) {
    int width = 1;  // bits of the largest key, d_sae
    while (width < 31 && e.d_sae >> width) ++width;
    passes = (width + kMostBits - 1) / kMostBits;
    bits = (width + passes - 1) / passes;
    const int64_t tiles = (int64_t{e.cap} + kTile - 1) / kTile;
    const int64_t of_block =
        std::max<int64_t>(1, (tiles + 4 * multiprocessors() - 1) / (4 * multiprocessors()));
    blocks = static_cast<int>((tiles + of_block - 1) / of_block);
    per_block = static_cast<int>(of_block * kTile);
    buffer = aligned(int64_t{e.cap} * 4);
    table = aligned((int64_t{blocks} << bits) * 4);
  }
  int64_t bytes() const { return 4 * buffer + table + aligned(int64_t{4} << bits); }
};

template <class F>
void launch(const GroupByLatentParams& p, cudaStream_t stream) {
  const EntriesParams& e = p.entries;
  const Sort sort(e);
  char* space = static_cast<char*>(p.scratch);
  uint32_t* keys[2] = {reinterpret_cast<uint32_t*>(space),
                       reinterpret_cast<uint32_t*>(space + sort.buffer)};
  int32_t* slots[2] = {reinterpret_cast<int32_t*>(space + 2 * sort.buffer),
                       reinterpret_cast<int32_t*>(space + 3 * sort.buffer)};
  unsigned* table = reinterpret_cast<unsigned*>(space + 4 * sort.buffer);
  unsigned* totals = reinterpret_cast<unsigned*>(space + 4 * sort.buffer + sort.table);
  const unsigned blocks = static_cast<unsigned>(sort.blocks);
  for (int i = 0; e.cap > 0 && i < sort.passes; ++i) {
    const SortPass pass{e.cap, sort.per_block, i * sort.bits, 1 << sort.bits};
    const int from = i & 1, to = from ^ 1;
    if (i == 0) {
      FASTSAE_LAUNCH(first_count_kernel<F>, blocks, kSortThreads, 0, stream, EntriesView<F>{e},
                     pass, keys[from], table);
    } else {
      FASTSAE_LAUNCH(count_kernel, blocks, kSortThreads, 0, stream, pass, keys[from], table);
    }
    FASTSAE_LAUNCH(scan_kernel, static_cast<unsigned>((pass.bins + kSortWarps - 1) / kSortWarps),
                   kSortThreads, 0, stream, pass.bins, sort.blocks, table, totals);
    FASTSAE_LAUNCH(scatter_kernel, blocks, kSortThreads, 0, stream, pass, keys[from],
                   i == 0 ? nullptr : slots[from], table, totals, keys[to], slots[to]);
  }
  const int64_t most = std::max<int64_t>(e.cap, int64_t{e.d_sae} + 1);
  const int last = sort.passes & 1;
  FASTSAE_LAUNCH(lists_kernel<F>, grid_of((most + kSortThreads - 1) / kSortThreads), kSortThreads,
                 0, stream, EntriesView<F>{e}, keys[last], slots[last], p.offsets, p.rows, p.slots);
}

}  // namespace

int64_t group_by_latent_scratch(const EntriesParams& entries) {
  return Sort(entries).bytes();
}

const char* launch_group_by_latent(const GroupByLatentParams& params, Format format, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  with_format(format, [&](auto f) { launch<decltype(f)>(params, on); });
  return launch_error();
}

}  // namespace fastsae::cuda
