// Products of a warpgroup on Hopper's tensor cores (wgmma), read from shared memory: asynchronous,
// their sums in registers.
#pragma once

#include "cuda/hopper_barrier.cuh"

namespace fastsae::cuda {

constexpr int kProductRows = 64, kProductColumns = 256, kProductDepth = 16;  // of one instruction
constexpr int kSums = kProductRows * kProductColumns / 128;                  // of a thread

// A sum whose bits are looked at, as a number that the compiler knows nothing of: it would hold the
// sums as integers otherwise, and wait for every product to move them.
__device__ __forceinline__ float opaque(float x) {
#ifndef FASTSAE_EMULATED
  asm("" : "+f"(x));
#endif
  return x;
}

#ifdef FASTSAE_HOPPER

// Where the sums of a thread lie in the 64 x 256 product: sum i in row + 8 (i / 2 % 2),
// column + 8 (i / 4) + i % 2.
__device__ __forceinline__ int first_row_of_sums() {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  return thread / 32 * 16 + thread % 32 / 4;
}
__device__ __forceinline__ int first_column_of_sums() {
  return 2 * (static_cast<int>(threadIdx.x) % 4);
}

// An operand as load_tile leaves it: rows of 128 bytes with exchanged pieces, 8 of them to a
// pattern of 1024 bytes. `at` is in the first row of a pattern, 32 bytes further for every 16
// columns.
__device__ __forceinline__ uint64_t operand(uint32_t at) {
  constexpr uint64_t kNextPattern = 1024, kExchanged128 = 1;
  // Bits 0: address / 16; 32: bytes to the next 8 rows / 16; 62: the exchange. The field at 16,
  // bytes to the next columns, is not used within 128 bytes.
  return uint64_t{(at & 0x3ffffu) >> 4} | uint64_t{1} << 16 | (kNextPattern >> 4) << 32 |
         kExchanged128 << 62;
}

// Before the first product after anything else has used the registers of its sums.
__device__ __forceinline__ void fence_products() {
#ifdef FASTSAE_EMULATED
  emu::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#endif
}

// s (+)= A [64, 16] B [256, 16]^T. By all threads of a warpgroup.
__device__ __forceinline__ void multiply_add(float (&s)[kSums], uint64_t a, uint64_t b, bool add) {
#ifdef FASTSAE_EMULATED
  emu::wgmma(s, kProductColumns, a, b, add);
#else
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
      "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
      "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
      "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
      "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "
      "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "
      "%120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, add, 1, 1, 0, 0;\n"
      "}"
      :  // clang-format off
        "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]),
        "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
        "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]),
        "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
        "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]),
        "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
        "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]),
        "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]),
        "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]),
        "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]),
        "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]),
        "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]),
        "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]),
        "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]),
        "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]),
        "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63]),
        "+f"(s[64]), "+f"(s[65]), "+f"(s[66]), "+f"(s[67]),
        "+f"(s[68]), "+f"(s[69]), "+f"(s[70]), "+f"(s[71]),
        "+f"(s[72]), "+f"(s[73]), "+f"(s[74]), "+f"(s[75]),
        "+f"(s[76]), "+f"(s[77]), "+f"(s[78]), "+f"(s[79]),
        "+f"(s[80]), "+f"(s[81]), "+f"(s[82]), "+f"(s[83]),
        "+f"(s[84]), "+f"(s[85]), "+f"(s[86]), "+f"(s[87]),
        "+f"(s[88]), "+f"(s[89]), "+f"(s[90]), "+f"(s[91]),
        "+f"(s[92]), "+f"(s[93]), "+f"(s[94]), "+f"(s[95]),
        "+f"(s[96]), "+f"(s[97]), "+f"(s[98]), "+f"(s[99]),
        "+f"(s[100]), "+f"(s[101]), "+f"(s[102]), "+f"(s[103]),
        "+f"(s[104]), "+f"(s[105]), "+f"(s[106]), "+f"(s[107]),
        "+f"(s[108]), "+f"(s[109]), "+f"(s[110]), "+f"(s[111]),
        "+f"(s[112]), "+f"(s[113]), "+f"(s[114]), "+f"(s[115]),
        "+f"(s[116]), "+f"(s[117]), "+f"(s[118]), "+f"(s[119]),
        "+f"(s[120]), "+f"(s[121]), "+f"(s[122]), "+f"(s[123]),
        "+f"(s[124]), "+f"(s[125]), "+f"(s[126]), "+f"(s[127])
      // clang-format on
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#endif
}

// Closes the group of the products since the last one.
__device__ __forceinline__ void commit_products() {
#ifdef FASTSAE_EMULATED
  emu::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
#endif
}

// Waits until at most so many groups are under way. Only when none is are the sums there; operands
// of the groups that have ended may be written over as far as this warp is concerned.
template <int kGroups>
__device__ __forceinline__ void wait_products(float (&s)[kSums]) {
#ifdef FASTSAE_EMULATED
  (void)s;
  emu::wgmma_wait(kGroups);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kGroups) : "memory");
  if constexpr (kGroups == 0) {
    // The compiler may not read a sum before.
#pragma unroll
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(s[i]) : : "memory");
  }
#endif
}

// Registers for each thread of this warpgroup, from those that the block has: a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef FASTSAE_EMULATED
  emu::set_registers(kRegisters);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#ifdef FASTSAE_EMULATED
  emu::set_registers(kRegisters);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}

#endif

}  // namespace fastsae::cuda
