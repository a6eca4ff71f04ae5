// A launch: its checks, and its blocks on the OS threads.
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "block.h"

namespace emu {
namespace {

// Runners are kept for the next launch: a thousand stacks take longer to make than a small kernel
// to run. One that met an error is not: its fibers stand somewhere in the middle.
std::mutex idle_mutex;
std::vector<std::unique_ptr<BlockRunner>>& idle_runners() {
  static auto* kept = new std::vector<std::unique_ptr<BlockRunner>>;  // as long as the process
  return *kept;
}
std::unique_ptr<BlockRunner> take_runner() {
  std::lock_guard<std::mutex> guard(idle_mutex);
  if (idle_runners().empty()) return std::make_unique<BlockRunner>();
  std::unique_ptr<BlockRunner> taken = std::move(idle_runners().back());
  idle_runners().pop_back();
  return taken;
}
void keep_runner(std::unique_ptr<BlockRunner> idle) {
  std::lock_guard<std::mutex> guard(idle_mutex);
  if (idle->error().empty()) idle_runners().push_back(std::move(idle));
}

std::mutex shared_mutex;
std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
// Memory of its own and of exactly that size, filled with a NaN pattern: overruns and reads before
// writes show up.
std::unique_ptr<void, Free> dynamic_shared(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, bytes)) fail("out of memory");
  std::memset(memory, 0xff, bytes);
  return std::unique_ptr<void, Free>(memory);
}

// EMU_ORDER: reverse, random or random:SEED.
Order order_of_threads(uint64_t* seed) {
  const char* said = std::getenv("EMU_ORDER");
  if (said && !std::strcmp(said, "reverse")) return Order::kReverse;
  if (!said || std::strncmp(said, "random", 6)) return Order::kForward;
  *seed = said[6] == ':' ? std::strtoull(said + 7, nullptr, 10) : 1;
  return Order::kRandom;
}

// EMU_THREADS: OS threads; otherwise one for each core.
unsigned workers_for(uint64_t blocks) {
  const char* said = std::getenv("EMU_THREADS");
  const unsigned asked =
      said ? static_cast<unsigned>(std::atoi(said)) : std::thread::hardware_concurrency();
  return static_cast<unsigned>(std::min<uint64_t>(std::max(1u, asked), blocks));
}

}  // namespace

void set_max_dynamic_smem(const void* kernel, int bytes) {
  std::lock_guard<std::mutex> guard(shared_mutex);
  shared_limits()[kernel] = static_cast<size_t>(bytes);
}
// Without permission 48 KiB, of which up to 8 are left for the static shared memory of a kernel.
size_t max_dynamic_smem(const void* kernel) {
  std::lock_guard<std::mutex> guard(shared_mutex);
  const auto found = shared_limits().find(kernel);
  return found == shared_limits().end() ? 40 * 1024 : found->second;
}

void launch_impl(const char* name, dim3 grid, dim3 block, size_t smem, Body body, void* context) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || block.z > 64 || grid.y > 65535 ||
      grid.z > 65535) {
    fail(std::string("invalid launch configuration of ") + name);
  }
  if (smem == static_cast<size_t>(-1)) {
    fail(std::string("too much dynamic shared memory for ") + name + " (cudaFuncSetAttribute?)");
  }
  uint64_t seed = 0;
  const Order order = order_of_threads(&seed);
  std::atomic<uint64_t> next{0};
  std::mutex error_mutex;
  std::string error;
  const auto work = [&] {
    std::unique_ptr<BlockRunner> own = take_runner();
    runner = own.get();
    tl.bdim = block;
    tl.gdim = grid;
    own->start(body, context, static_cast<unsigned>(threads), order, seed);
    for (uint64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      const std::unique_ptr<void, Free> shared = dynamic_shared(smem);
      tl.dyn_smem = static_cast<unsigned char*>(shared.get());
      tl.dyn_smem_bytes = smem;
      tl.bid = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / (static_cast<uint64_t>(grid.x) * grid.y))};
      own->run_block();
      if (!own->error().empty()) {
        std::lock_guard<std::mutex> guard(error_mutex);
        if (error.empty()) error = own->error();
        next = blocks;
      }
    }
    tl.dyn_smem = nullptr;
    tl.dyn_smem_bytes = 0;
    runner = nullptr;
    keep_runner(std::move(own));
  };
  const unsigned workers = workers_for(blocks);
  if (workers == 1) {
    work();
  } else {
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < workers; ++i) pool.emplace_back(work);
    for (std::thread& thread : pool) thread.join();
  }
  if (!error.empty()) fail(std::string(name) + ": " + error);
}

}  // namespace emu
