#include "emulator.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#endif
#if defined(EMU_TSAN)  // this file itself is compiled without -fsanitize=thread: only the kernels
                       // are watched
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
thread_local State tl;
namespace {

[[noreturn]] void fail(const std::string& m) {
  throw std::runtime_error("emulator: " + m);
}

constexpr size_t kStack =
#if defined(EMU_ASAN) || defined(EMU_TSAN)
    256 * 1024;
#else
    64 * 1024;
#endif
constexpr size_t kGuard = 4096;

struct Site {
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Site& o) const { return line == o.line && std::strcmp(file, o.file) == 0; }
  std::string str() const { return std::string(file) + ":" + std::to_string(line); }
};

struct FiberFull : Fiber {
  void* sp = nullptr;
  char* stack = nullptr;  // low address, above the guard page
  bool ready = false, done = false;
  const char* waiting = "";
  Site site;
#if EMU_ASAN
  void* fake = nullptr;
#endif
#if EMU_TSAN
  void* tsan = nullptr;
#endif
};

struct Coll {  // one in-flight warp collective per distinct mask
  uint32_t mask = 0, arrived = 0;
  uint64_t gen = 0;
  uint64_t slot[2][32];
  Site site;
};
struct Warp {
  uint32_t live = 0;
  std::deque<Coll> colls;  // a deque: references stay valid while it grows
};

struct Runner {  // one per OS thread: runs blocks one after another, reusing stacks
  std::vector<FiberFull> f;
  std::vector<Warp> warps;
  void* main_sp = nullptr;
  unsigned n = 0, live = 0, arrived = 0;
  int count = 0, count_done = 0;
  Site bar;
  std::string error;
  Body body = nullptr;
  void* ctx = nullptr;
  std::vector<unsigned> order;
  uint64_t rng = 0;
  int order_mode = 0;  // 0 forward, 1 reverse, 2 random
  unsigned bar_gen = 0;
  // What ThreadSanitizer takes as ordering. Two per barrier, in turn: a thread already past one
  // barrier must not hand its later accesses to a thread that is still leaving it.
  char tsan_bar[2] = {}, tsan_begin = 0, tsan_end = 0;
#if EMU_ASAN
  void* main_fake = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
#endif
#if EMU_TSAN
  void* main_tsan = nullptr;
#endif

  ~Runner() {
    for (auto& x : f) {
#if EMU_TSAN
      if (x.tsan) __tsan_destroy_fiber(x.tsan);
#endif
      if (x.stack) munmap(x.stack - kGuard, kStack + kGuard);
    }
  }
  FiberFull& self() { return *static_cast<FiberFull*>(tl.cur); }

  void to_main() {
    FiberFull& me = self();
#if EMU_ASAN
    __sanitizer_start_switch_fiber(me.done ? nullptr : &me.fake, main_bottom, main_size);
#endif
#if EMU_TSAN
    __tsan_switch_to_fiber(main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
    fastsae_emulator_switch(&me.sp, main_sp);
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(me.fake, &main_bottom, &main_size);
#endif
  }
  void to_fiber(FiberFull& x) {
    tl.cur = &x;
#if EMU_ASAN
    __sanitizer_start_switch_fiber(&main_fake, x.stack, kStack);
#endif
#if EMU_TSAN
    __tsan_switch_to_fiber(x.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    fastsae_emulator_switch(&main_sp, x.sp);
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
    tl.cur = nullptr;
  }
  void block_on(const char* what, Site s) {
    FiberFull& me = self();
    me.ready = false;
    me.waiting = what;
    me.site = s;
    to_main();
  }

  void release_barrier() {
    arrived = 0;
    ++bar_gen;
    count_done = count;
    count = 0;
    for (unsigned i = 0; i < n; ++i)
      if (!f[i].done && f[i].waiting[0] == '_') f[i].ready = true, f[i].waiting = "";
  }
  int barrier(int pred, Site s) {
    if (arrived == 0) bar = s;
    else if (!(bar == s))
      error_out("divergent __syncthreads: some threads are at " + bar.str() + ", others at " +
                s.str());
#if EMU_TSAN
    const unsigned g = bar_gen & 1;
    __tsan_release(&tsan_bar[g]);
#endif
    count += pred != 0;
    if (++arrived == live) release_barrier();
    else block_on("__syncthreads", s);
#if EMU_TSAN
    __tsan_acquire(&tsan_bar[g]);
#endif
    return count_done;
  }
  const uint64_t* exchange(uint32_t mask, uint64_t v, bool orders_memory, Site s) {
    FiberFull& me = self();
    Warp& w = warps[me.warp];
    if (!(mask >> me.lane & 1u)) error_out("lane not in its own mask at " + s.str());
    if (mask & ~w.live)
      error_out("mask names a lane that has exited or does not exist at " + s.str());
    Coll* c = nullptr;
    for (auto& k : w.colls)
      if (k.mask == mask) c = &k;
    if (!c) {
      w.colls.emplace_back();
      c = &w.colls.back();
      c->mask = mask;
    }
    if (c->arrived == 0) {
      c->site = s;
      for (auto& p : c->slot[c->gen & 1]) p = 0xdeadbeefdeadbeefull;
    } else if (!(c->site == s)) {
      error_out("divergent warp collective: lanes at " + c->site.str() + " and " + s.str());
    }
    const unsigned parity = c->gen & 1;
    c->slot[parity][me.lane] = v;
    c->arrived |= 1u << me.lane;
    (void)orders_memory;
#if EMU_TSAN
    if (orders_memory) __tsan_release(&c->slot[parity]);
#endif
    if (c->arrived == mask) {
      c->arrived = 0;
      ++c->gen;
      const unsigned base = me.linear - me.lane;
      for (unsigned l = 0; l < 32 && base + l < n; ++l)
        if ((mask >> l & 1u) && f[base + l].waiting[0] == 'w')
          f[base + l].ready = true, f[base + l].waiting = "";
    } else {
      block_on("warp collective", s);
    }
#if EMU_TSAN
    if (orders_memory) __tsan_acquire(&c->slot[parity]);
#endif
    return c->slot[parity];
  }
  [[noreturn]] void error_out(const std::string& m) {
    char buf[96];
    const FiberFull& me = self();
    std::snprintf(buf, sizeof buf, " (block %u,%u thread %u,%u,%u)", tl.bid.x, tl.bid.y, me.tid.x,
                  me.tid.y, me.tid.z);
    error = m + buf;
    to_main();
    std::abort();
  }

  static void entry();
  void prepare(FiberFull& x) {
    // A fresh frame: six callee-saved registers, then entry as the return address; 16-byte
    // alignment as after a call.
    void** top = reinterpret_cast<void**>(x.stack + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Runner::entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    x.sp = top;
    x.ready = true;
    x.done = false;
    x.waiting = "";
  }
  void setup(unsigned threads) {
    while (f.size() < threads) {
      FiberFull x;
      void* p = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) fail("mmap of a fiber stack failed");
      mprotect(p, kGuard, PROT_NONE);
      x.stack = static_cast<char*>(p) + kGuard;
#if EMU_TSAN
      x.tsan = __tsan_create_fiber(0);
#endif
      f.push_back(x);
    }
#if EMU_TSAN
    main_tsan = __tsan_get_current_fiber();
#endif
  }
  void run_block() {
    const dim3 b = tl.bdim;
    n = live = b.x * b.y * b.z;
    arrived = 0;
    count = 0;
    error.clear();
    warps.assign((n + 31) / 32, Warp{});
    order.resize(n);
    for (unsigned i = 0; i < n; ++i) {
      FiberFull& x = f[i];
      x.tid = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
      x.linear = i;
      x.lane = i % 32;
      x.warp = i / 32;
      warps[x.warp].live |= 1u << x.lane;
      order[i] = order_mode == 1 ? n - 1 - i : i;
      prepare(x);
    }
#if EMU_TSAN
    __tsan_release(&tsan_begin);
#endif
    while (live) {
      if (order_mode == 2)
        for (unsigned i = n; i > 1; --i) {
          rng = rng * 6364136223846793005ull + 1442695040888963407ull;
          std::swap(order[i - 1], order[(rng >> 33) % i]);
        }
      bool progress = false;
      for (unsigned i : order)
        if (f[i].ready) {
          to_fiber(f[i]);
          progress = true;
          if (!error.empty()) return;
        }
      if (!progress) {
        std::map<std::string, unsigned> at;
        for (unsigned i = 0; i < n; ++i)
          if (!f[i].done) ++at[std::string(f[i].waiting) + " at " + f[i].site.str()];
        error = "deadlock:";
        for (auto& [k, v] : at)
          error.append(1, ' ')
              .append(std::to_string(v))
              .append(" threads wait in ")
              .append(k)
              .append(1, ';');
        return;
      }
    }
#if EMU_TSAN
    __tsan_acquire(&tsan_end);
#endif
  }
};
thread_local Runner* runner = nullptr;

void Runner::entry() {
  Runner& r = *runner;
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &r.main_bottom, &r.main_size);
#endif
#if EMU_TSAN
  __tsan_acquire(&r.tsan_begin);
#endif
  try {
    r.body(r.ctx);
  } catch (const std::exception& e) {
    r.error = e.what();
  }
#if EMU_TSAN
  __tsan_release(&r.tsan_end);
#endif
  FiberFull& me = r.self();
  me.done = true;
  me.ready = false;
  --r.live;
  r.warps[me.warp].live &= ~(1u << me.lane);
  if (r.arrived && r.arrived == r.live)
    r.release_barrier();  // exited threads do not count (sm_70 and later)
  r.to_main();
  std::abort();
}

// Runners are kept for the next launch: a thousand stacks take longer to make than a small kernel
// to run. One that met an error is not: its fibers stand somewhere in the middle.
std::mutex idle_mu;
std::vector<std::unique_ptr<Runner>>& idle_runners() {
  static auto* kept = new std::vector<std::unique_ptr<Runner>>;  // for as long as the process
  return *kept;
}
std::unique_ptr<Runner> take_runner() {
  std::lock_guard<std::mutex> g(idle_mu);
  if (idle_runners().empty()) return std::make_unique<Runner>();
  std::unique_ptr<Runner> r = std::move(idle_runners().back());
  idle_runners().pop_back();
  return r;
}
void keep_runner(std::unique_ptr<Runner> r) {
  std::lock_guard<std::mutex> g(idle_mu);
  if (r->error.empty()) idle_runners().push_back(std::move(r));
}

std::mutex smem_mu;
std::map<const void*, size_t>& smem_limits() {
  static std::map<const void*, size_t> m;
  return m;
}
}  // namespace

void set_max_dynamic_smem(const void* fn, int bytes) {
  std::lock_guard<std::mutex> g(smem_mu);
  smem_limits()[fn] = static_cast<size_t>(bytes);
}
// Without permission 48 KiB, of which up to 8 are left for the static shared memory of a kernel.
size_t max_dynamic_smem(const void* fn) {
  std::lock_guard<std::mutex> g(smem_mu);
  auto it = smem_limits().find(fn);
  return it == smem_limits().end() ? 40 * 1024 : it->second;
}
void syncthreads(const char* file, int line) {
  runner->barrier(0, {file, line});
}
int syncthreads_count(int p, const char* file, int line) {
  return runner->barrier(p, {file, line});
}
const uint64_t* exchange(uint32_t mask, uint64_t v, const char* file, int line,
                         bool orders_memory) {
  return runner->exchange(mask, v, orders_memory, {file, line});
}
uint32_t live_mask() {
  return runner->warps[tl.cur->warp].live;
}

void launch_impl(const char* name, dim3 grid, dim3 block, size_t smem, Body body, void* ctx) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || block.z > 64 || grid.y > 65535 ||
      grid.z > 65535)
    fail(std::string("invalid launch configuration of ") + name);
  if (smem == static_cast<size_t>(-1))
    fail(std::string("too much dynamic shared memory for ") + name + " (cudaFuncSetAttribute?)");
  const char* mode = std::getenv("EMU_ORDER");
  const char* nt = std::getenv("EMU_THREADS");
  unsigned workers =
      nt ? static_cast<unsigned>(std::atoi(nt)) : std::max(1u, std::thread::hardware_concurrency());
  workers = static_cast<unsigned>(std::min<uint64_t>(std::max(1u, workers), blocks));
  std::atomic<uint64_t> next{0};
  std::mutex mu;
  std::string error;
  auto work = [&] {
    std::unique_ptr<Runner> own = take_runner();
    Runner& r = *own;
    runner = &r;
    r.order_mode = 0;
    if (mode && !std::strcmp(mode, "reverse")) r.order_mode = 1;
    if (mode && !std::strncmp(mode, "random", 6))
      r.order_mode = 2, r.rng = mode[6] == ':' ? std::strtoull(mode + 7, nullptr, 10) : 1;
    r.body = body;
    r.ctx = ctx;
    tl.bdim = block;
    tl.gdim = grid;
    r.setup(static_cast<unsigned>(threads));
    for (uint64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      // Its own exact-size allocation, filled with a NaN pattern: overruns and reads before writes
      // show up.
      std::unique_ptr<void, decltype(&std::free)> dyn(nullptr, &std::free);
      if (smem) {
        void* p = nullptr;
        if (posix_memalign(&p, 1024, smem)) fail("out of memory");
        dyn.reset(p);
        std::memset(p, 0xff, smem);
      }
      tl.dyn_smem = static_cast<unsigned char*>(dyn.get());
      tl.bid = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / (static_cast<uint64_t>(grid.x) * grid.y))};
      r.run_block();
      if (!r.error.empty()) {
        std::lock_guard<std::mutex> g(mu);
        if (error.empty()) error = r.error;
        next = blocks;
      }
    }
    tl.dyn_smem = nullptr;
    runner = nullptr;
    keep_runner(std::move(own));
  };
  if (workers == 1) {
    work();
  } else {
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < workers; ++i) pool.emplace_back(work);
    for (auto& t : pool) t.join();
  }
  if (!error.empty()) fail(std::string(name) + ": " + error);
}
}  // namespace emu
