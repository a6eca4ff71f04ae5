// The only file that sees torch: the LibTorch stable ABI (target 2.11) and what it lacks.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

namespace fastsae {

// Throws torch's own words, such as "CUDA out of memory": callers look for them. Looked up at run
// time, because only torch 2.13 and later keep them.
[[noreturn]] inline void throw_torch_error(const char* call) {
  static const auto last_message = reinterpret_cast<const char* (*)()>(
      dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* message = last_message ? last_message() : nullptr;
  if (message && *message) throw std::runtime_error(message);
  throw std::runtime_error(std::string(call) + " failed in torch (torch 2.13 and later say why)");
}

}  // namespace fastsae

// Also for the stable headers below, whose own macro only says which call failed.
#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)   \
  if ((call) != TORCH_SUCCESS) {       \
    fastsae::throw_torch_error(#call); \
  }

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace fastsae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// out[n, m] = a[n, d] b[d, m] by the library's GEMM. The stable ABI has no wrapper with `out`.
inline void mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // The call returns `out` again as a new handle; taking it over releases it.
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// The same of bfloat16 or float16 matrices, with unrounded sums: out is float32. CUDA only.
inline void mm_widening_out(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out.scalar_type()),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace fastsae
