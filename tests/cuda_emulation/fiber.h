// A stack of its own for every CUDA thread, and what sanitizers have to be told when the processor
// goes from one to another.
#pragma once

#include <cstddef>
#include <string>

namespace emu {

[[noreturn]] void fail(const std::string& message);

// Where code stands: that of a fiber, or that of the OS thread which runs the fibers.
struct Context {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest address, above the guard page; null for the OS thread
  // What the sanitizers know it by.
  void* asan_fake_stack = nullptr;
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;
  void* tsan_fiber = nullptr;
};

// Makes and frees the stack of a fiber.
void create_fiber(Context& fiber);
void destroy_fiber(Context& fiber);
// Makes the next switch to the fiber call `entry`, which calls entered() first and never returns.
void prepare_fiber(Context& fiber, void (*entry)());

// Takes down who the OS thread is.
void adopt_os_thread(Context& os_thread);
// From the OS thread into a fiber, and back; `for_good`: the fiber has ended.
void switch_to_fiber(Context& os_thread, Context& fiber);
void switch_to_os_thread(Context& fiber, Context& os_thread, bool for_good);
void entered(Context& os_thread);

// Tell ThreadSanitizer that what comes before release() happens before what comes after acquire().
void release(void* address);
void acquire(void* address);

}  // namespace emu
