// The launch of the product on Hopper. Other GPUs have an empty kernel: callers ask first.
#include "cuda/hopper_product.h"

#include <algorithm>

#include "cuda/hopper_product_kernel.cuh"

namespace fastsae::cuda {

const char* launch_hopper_product(const HopperProductParams& p, void* stream) {
  if (p.n == 0 || p.columns == 0) return nullptr;
  TensorMap x, W;
  if (const char* error = describe_matrix(&x, p.x, p.n, p.d, kTileRows)) return error;
  if (const char* error = describe_matrix(&W, p.W, p.columns, p.d, kTileColumns)) return error;
  const auto tiles_of = [](int size, int of) { return (size - 1) / of + 1; };
  const ProductTiles tiles{tiles_of(p.n, kTileRows), tiles_of(p.columns, kTileColumns),
                           tiles_of(p.d, kTileDepth)};
  const StoreSums store{p.out, p.n, p.columns, p.columns % 2 == 0};
  allow_shared(&hopper_product_kernel<StoreSums>, kProductShared);
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(tiles.count(), multiprocessors()));
  FASTSAE_LAUNCH((hopper_product_kernel<StoreSums>), grid, kProductThreads, kProductShared,
                 static_cast<cudaStream_t>(stream), x, W, tiles, store);
  return launch_error();
}

}  // namespace fastsae::cuda
