#include "fiber.h"

#include <sys/mman.h>

#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#endif
#if defined(EMU_TSAN)  // the emulator is compiled without -fsanitize=thread: only the kernels are
                       // watched
#include <sanitizer/tsan_interface.h>
#endif

// Saves the callee-saved registers and the stack pointer, and continues on another stack. (x86-64
// System V.)
#if !defined(__x86_64__)
#error "emulator: only x86-64 has a context switch so far"
#endif
extern "C" void fastsae_emulator_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.globl fastsae_emulator_switch
.hidden fastsae_emulator_switch
.type fastsae_emulator_switch,@function
fastsae_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastsae_emulator_switch,.-fastsae_emulator_switch
)");

namespace emu {
namespace {

#if defined(EMU_ASAN) || defined(EMU_TSAN)
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif
constexpr size_t kGuard = 4096;

}  // namespace

void fail(const std::string& message) {
  throw std::runtime_error("emulator: " + message);
}

void create_fiber(Context& fiber) {
  void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("mmap of a fiber stack failed");
  mprotect(memory, kGuard, PROT_NONE);
  fiber.stack = static_cast<char*>(memory) + kGuard;
#if EMU_TSAN
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
}

void destroy_fiber(Context& fiber) {
#if EMU_TSAN
  if (fiber.tsan_fiber) __tsan_destroy_fiber(fiber.tsan_fiber);
#endif
  if (fiber.stack) munmap(fiber.stack - kGuard, kStack + kGuard);
}

void prepare_fiber(Context& fiber, void (*entry)()) {
  // A fresh frame: six callee-saved registers, then entry as the return address; 16-byte alignment
  // as after a call.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void adopt_os_thread([[maybe_unused]] Context& os_thread) {
#if EMU_TSAN
  os_thread.tsan_fiber = __tsan_get_current_fiber();
#endif
}

void switch_to_fiber(Context& os_thread, Context& fiber) {
#if EMU_ASAN
  __sanitizer_start_switch_fiber(&os_thread.asan_fake_stack, fiber.stack, kStack);
#endif
#if EMU_TSAN
  __tsan_switch_to_fiber(fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  fastsae_emulator_switch(&os_thread.stack_pointer, fiber.stack_pointer);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(os_thread.asan_fake_stack, nullptr, nullptr);
#endif
}

void switch_to_os_thread(Context& fiber, Context& os_thread, [[maybe_unused]] bool for_good) {
#if EMU_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.asan_fake_stack, os_thread.asan_bottom,
                                 os_thread.asan_size);
#endif
#if EMU_TSAN
  __tsan_switch_to_fiber(os_thread.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  fastsae_emulator_switch(&fiber.stack_pointer, os_thread.stack_pointer);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, &os_thread.asan_bottom,
                                  &os_thread.asan_size);
#endif
}

void entered([[maybe_unused]] Context& os_thread) {
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &os_thread.asan_bottom, &os_thread.asan_size);
#endif
}

void release([[maybe_unused]] void* address) {
#if EMU_TSAN
  __tsan_release(address);
#endif
}

void acquire([[maybe_unused]] void* address) {
#if EMU_TSAN
  __tsan_acquire(address);
#endif
}

}  // namespace emu
