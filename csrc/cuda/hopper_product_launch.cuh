// Launches the product on Hopper with an epilogue.
#pragma once

#include <algorithm>

#include "cuda/hopper_product.h"
#include "cuda/hopper_product_kernel.cuh"

namespace fastsae::cuda {

// `p.out` and its pitch are for the epilogue to know.
template <class Epilogue>
const char* launch_product_with(const HopperProductParams& p, const Epilogue& epilogue,
                                cudaStream_t stream) {
  if (p.n == 0 || p.columns == 0) return nullptr;
  TensorMap x, W;
  if (const char* error = describe_matrix(&x, p.x, p.n, p.d, kTileRows)) return error;
  if (const char* error = describe_matrix(&W, p.W, p.columns, p.d, kTileColumns)) return error;
  const auto tiles_of = [](int size, int of) { return (size - 1) / of + 1; };
  const ProductTiles tiles{tiles_of(p.n, kTileRows), tiles_of(p.columns, kTileColumns),
                           tiles_of(p.d, kTileDepth), p.found, p.before};
  allow_shared(&hopper_product_kernel<Epilogue>, kProductShared);
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(tiles.count(), multiprocessors()));
  FASTSAE_LAUNCH((hopper_product_kernel<Epilogue>), grid, kProductThreads, kProductShared, stream,
                 x, W, tiles, epilogue);
  return launch_error();
}

}  // namespace fastsae::cuda
