// The kernels at one instruction-set level. scalar.cpp, avx2.cpp and avx512.cpp each define
// FASTSAE_LEVEL and include their vectors before this; each alone has its compiler flags.
#include "cpu/adam_impl.h"
#include "cpu/filter_impl.h"
#include "cpu/gather_impl.h"
#include "cpu/latent_impl.h"
#include "cpu/select_impl.h"
#include "cpu/tile_impl.h"

namespace fastsae::cpu {
namespace {

template <class V, class T>
constexpr Kernels<T> kTable{group_max<V, T>, filter<V, T>,        keep_largest<V>,
                            kth_bound<V>,    gather_sum<V, T, T>, gather_sum<V, T, typename V::A>,
                            widen_row<V, T>, gather_dot<V, T, T>, gather_dot<V, T, typename V::A>,
                            widen_max<V, T>, lane_max<V, T>,      filter_chunks<V, T>};

}  // namespace

#define FASTSAE_TABLE(Table, name, type, value)           \
  template <>                                             \
  template <>                                             \
  const Table<type>& Level<FASTSAE_LEVEL>::name<type>() { \
    return value;                                         \
  }

FASTSAE_TABLE(Kernels, table, float, (kTable<VecF, float>))
FASTSAE_TABLE(Kernels, table, double, (kTable<VecD, double>))
FASTSAE_TABLE(Kernels, table, bf16, (kTable<VecF, bf16>))
FASTSAE_TABLE(Kernels, table, fp16, (kTable<VecF, fp16>))
FASTSAE_TABLE(TileKernels, tile, float, (kTileTable<VecF, PlainWords<VecF>>))
FASTSAE_TABLE(TileKernels, tile, double, (kTileTable<VecD, PlainWords<VecD>>))
FASTSAE_TABLE(LatentKernels, latents, float, kLatentTable<VecF>)
FASTSAE_TABLE(LatentKernels, latents, double, kLatentTable<VecD>)
FASTSAE_TABLE(AdamKernels, adam, float, kAdamTable<VecF>)
FASTSAE_TABLE(AdamKernels, adam, double, kAdamTable<VecD>)

#undef FASTSAE_TABLE

}  // namespace fastsae::cpu
