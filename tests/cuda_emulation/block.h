// The threads of a block as fibers of one OS thread, their barriers and their warp operations.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "async_units.h"
#include "emulator.h"
#include "fiber.h"

namespace emu {

// A place in the source.
struct Site {
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Site& other) const;
  std::string text() const;
};

enum class Wait { kNothing, kBarrier, kWarp, kPhase };
enum class Order { kForward, kReverse, kRandom };

struct Thread : Fiber {
  Context context;
  bool ready = false, done = false;
  Wait wait = Wait::kNothing;
  Site site;              // of what it waits for
  uint32_t phase_of = 0;  // kPhase: the barrier in shared memory
};

// An operation of some lanes of a warp that is under way: one for each mask.
struct Collective {
  uint32_t mask = 0, arrived = 0;
  uint64_t generation = 0;
  uint64_t slots[2][32];  // of this generation and of the one before, which is still being read
  Site site;
};

struct Warp {
  uint32_t live = 0;
  std::deque<Collective> collectives;  // a deque: references stay valid while it grows
};

// Runs blocks one after another, reusing stacks; one for each OS thread.
class BlockRunner {
 public:
  ~BlockRunner();

  // Before the blocks of a launch.
  void start(Body body, void* context, unsigned threads, Order order, uint64_t seed);
  // Runs block tl.bid of tl.bdim threads. What went wrong is in error().
  void run_block();
  const std::string& error() const { return error_; }

  // For the thread that runs.
  int barrier(int predicate, Site site);
  const uint64_t* exchange(uint32_t mask, uint64_t value, bool orders_memory, Site site);
  uint32_t live_lanes() { return warp_of(self()).live; }
  AsyncUnits& units() { return units_; }
  // Until a phase of an mbarrier ends, and the end of it.
  void wait_for(uint32_t barrier, bool phase);
  void wake(uint32_t barrier);
  [[noreturn]] void stop(const std::string& message);

 private:
  static void entry();
  Thread& self() { return *static_cast<Thread*>(tl.cur); }
  Warp& warp_of(const Thread& thread) { return warps_[thread.warp]; }
  Collective& collective_of(Warp& warp, uint32_t mask);
  void reset_threads();
  void shuffle_order();
  void leave() { switch_to_os_thread(self().context, os_thread_, self().done); }
  void wait(Wait what, Site site);
  void finish_self();
  void release_barrier();
  std::string deadlock() const;

  AsyncUnits units_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Context os_thread_;
  std::string error_;
  Body body_ = nullptr;
  void* body_context_ = nullptr;

  unsigned size_ = 0, live_ = 0;    // threads of the block, and those that have not ended
  unsigned arrived_ = 0;            // at the barrier
  unsigned barriers_ = 0;           // passed so far
  int count_ = 0, last_count_ = 0;  // predicates that were true, at this barrier and the last one
  Site barrier_site_;

  Order order_ = Order::kForward;
  std::vector<unsigned> turns_;
  uint64_t random_ = 0;

  // What ThreadSanitizer takes as ordering. Two for barriers, in turn: a thread already past one
  // barrier must not hand its later accesses to a thread that is still leaving it.
  char barrier_order_[2] = {}, begin_order_ = 0, end_order_ = 0;
};

// That of this OS thread, while it runs a launch.
extern thread_local BlockRunner* runner;

}  // namespace emu
