// How the encode ops meet their pre-activations: which way, and how much at a time. No torch, no
// CUDA.
#pragma once

#include <cstdint>
#include <string>

namespace fastsae::cuda {

enum class EncodeWay {
  kRows,     // whole rows, as many as kChunkBytes hold (encoder.h)
  kBlocks,   // blocks of rows x latents that fit into the second-level cache
  kOverlap,  // the same, and the selection from one runs beside the product of the next
  kHopper,   // selected where an own product computes them (encoder_hopper.h); else as kRows
};

// Sizes of a block; kRows and kHopper have none.
struct EncodePlan {
  EncodeWay way = EncodeWay::kRows;
  int64_t rows = 0, columns = 0;
};

// Latents of a block: a multiple of kColumnStep, so that its rows are aligned, and no more than
// kMostColumns, whose numbers within a row have 16 bits to spare.
constexpr int64_t kColumnStep = 64, kMostColumns = 8192;

// Blocks of 32 MiB of float32; of half as much where there are two at a time. Small in the
// emulation, so that there are many.
#ifdef FASTSAE_EMULATED
constexpr int64_t kBlockRows = 32, kBlockColumns = 256;
#else
constexpr int64_t kBlockRows = 2048, kBlockColumns = 4096;
#endif

// The way for n rows and d_sae latents, in an accumulator of so many bytes: what
// FASTSAE_CUDA_ENCODE or the last call of fastsae_set_cuda_encode said, or kRows. Only a
// measurement on the hardware in question may put another default here.
EncodePlan encode_plan(int64_t n, int64_t d_sae);

// Whether that is kHopper. encode_plan says kRows then, for what the own product does not serve.
bool encode_plan_is_hopper();

}  // namespace fastsae::cuda

// For tests and measurements, called through ctypes: "rows", "hopper", "blocks" or "overlap", the
// latter two also with sizes as in "blocks:2048x4096". Returns 0, or -1 if `way` is none of these
// (nothing changes then).
extern "C" int fastsae_set_cuda_encode(const char* way);
extern "C" const char* fastsae_cuda_encode();
