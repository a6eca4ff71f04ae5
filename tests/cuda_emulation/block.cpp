#include "block.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <utility>

namespace emu {

thread_local State tl;
thread_local BlockRunner* runner = nullptr;

namespace {

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::kBarrier:
      return "__syncthreads";
    case Wait::kPhase:
      return "the end of a phase";
    default:
      return "warp collective";
  }
}

}  // namespace

bool Site::operator==(const Site& other) const {
  return line == other.line && std::strcmp(file, other.file) == 0;
}
std::string Site::text() const {
  return std::string(file) + ":" + std::to_string(line);
}

BlockRunner::~BlockRunner() {
  for (Thread& thread : threads_) destroy_fiber(thread.context);
}

void BlockRunner::start(Body body, void* context, unsigned threads, Order order, uint64_t seed) {
  body_ = body;
  body_context_ = context;
  order_ = order;
  random_ = seed;
  while (threads_.size() < threads) {
    Thread thread;
    create_fiber(thread.context);
    threads_.push_back(thread);
  }
  adopt_os_thread(os_thread_);
}

void BlockRunner::reset_threads() {
  const dim3 dim = tl.bdim;
  size_ = live_ = dim.x * dim.y * dim.z;
  arrived_ = 0;
  count_ = 0;
  error_.clear();
  warps_.assign((size_ + 31) / 32, Warp{});
  turns_.resize(size_);
  for (unsigned i = 0; i < size_; ++i) {
    Thread& thread = threads_[i];
    thread.tid = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
    thread.linear = i;
    thread.lane = i % 32;
    thread.warp = i / 32;
    thread.ready = true;
    thread.done = false;
    thread.wait = Wait::kNothing;
    prepare_fiber(thread.context, &BlockRunner::entry);
    warp_of(thread).live |= 1u << thread.lane;
    turns_[i] = order_ == Order::kReverse ? size_ - 1 - i : i;
  }
}

void BlockRunner::shuffle_order() {
  for (unsigned i = size_; i > 1; --i) {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(turns_[i - 1], turns_[(random_ >> 33) % i]);
  }
}

void BlockRunner::run_block() {
  reset_threads();
  units_.begin(size_, random_);
  release(&begin_order_);
  while (live_) {
    if (order_ == Order::kRandom) shuffle_order();
    bool progress = false;
    for (unsigned i : turns_) {
      Thread& thread = threads_[i];
      if (!thread.ready) continue;
      tl.cur = &thread;
      switch_to_fiber(os_thread_, thread.context);
      tl.cur = nullptr;
      progress = true;
      if (!error_.empty()) return;
    }
    if (progress) continue;
    try {
      if (!units_.progress()) error_ = deadlock();
    } catch (const std::exception& error) {
      error_ = error.what();
    }
    if (!error_.empty()) return;
  }
  acquire(&end_order_);
  error_ = units_.left_behind();
}

std::string BlockRunner::deadlock() const {
  std::map<std::string, unsigned> waiting;
  for (unsigned i = 0; i < size_; ++i) {
    const Thread& thread = threads_[i];
    if (!thread.done) ++waiting[std::string(name_of(thread.wait)) + " at " + thread.site.text()];
  }
  std::string message = "deadlock:";
  for (const auto& [where, count] : waiting) {
    message += ' ';
    message += std::to_string(count);
    message += " threads wait in ";
    message += where;
    message += ';';
  }
  return message;
}

void BlockRunner::entry() {
  BlockRunner& block = *runner;
  entered(block.os_thread_);
  acquire(&block.begin_order_);
  try {
    block.body_(block.body_context_);
  } catch (const std::exception& error) {
    block.error_ = error.what();
  }
  release(&block.end_order_);
  block.finish_self();
  block.leave();
  std::abort();
}

void BlockRunner::finish_self() {
  Thread& thread = self();
  thread.done = true;
  thread.ready = false;
  --live_;
  warp_of(thread).live &= ~(1u << thread.lane);
  // Threads that have ended do not count (sm_70 and later).
  if (arrived_ && arrived_ == live_) release_barrier();
}

void BlockRunner::wait(Wait what, Site site) {
  Thread& thread = self();
  thread.ready = false;
  thread.wait = what;
  thread.site = site;
  leave();
}

void BlockRunner::wait_for(uint32_t barrier, bool phase) {
  self().phase_of = barrier;
  wait(Wait::kPhase, {phase ? "odd, of mbarrier" : "even, of mbarrier", static_cast<int>(barrier)});
}

void BlockRunner::wake(uint32_t barrier) {
  for (unsigned i = 0; i < size_; ++i) {
    Thread& thread = threads_[i];
    if (thread.done || thread.wait != Wait::kPhase || thread.phase_of != barrier) continue;
    thread.ready = true;
    thread.wait = Wait::kNothing;
  }
}

void BlockRunner::release_barrier() {
  arrived_ = 0;
  ++barriers_;
  last_count_ = count_;
  count_ = 0;
  for (unsigned i = 0; i < size_; ++i) {
    Thread& thread = threads_[i];
    if (thread.done || thread.wait != Wait::kBarrier) continue;
    thread.ready = true;
    thread.wait = Wait::kNothing;
  }
}

int BlockRunner::barrier(int predicate, Site site) {
  if (arrived_ == 0) {
    barrier_site_ = site;
  } else if (!(barrier_site_ == site)) {
    stop("divergent __syncthreads: some threads are at " + barrier_site_.text() + ", others at " +
         site.text());
  }
  char* order = &barrier_order_[barriers_ & 1];
  release(order);
  count_ += predicate != 0;
  if (++arrived_ == live_) release_barrier();
  else wait(Wait::kBarrier, site);
  acquire(order);
  return last_count_;
}

Collective& BlockRunner::collective_of(Warp& warp, uint32_t mask) {
  for (Collective& collective : warp.collectives) {
    if (collective.mask == mask) return collective;
  }
  warp.collectives.emplace_back();
  warp.collectives.back().mask = mask;
  return warp.collectives.back();
}

const uint64_t* BlockRunner::exchange(uint32_t mask, uint64_t value, bool orders_memory,
                                      Site site) {
  Thread& thread = self();
  Warp& warp = warp_of(thread);
  if (!(mask >> thread.lane & 1u)) stop("lane not in its own mask at " + site.text());
  if (mask & ~warp.live) {
    stop("mask names a lane that has exited or does not exist at " + site.text());
  }
  Collective& collective = collective_of(warp, mask);
  uint64_t* slots = collective.slots[collective.generation & 1];
  if (collective.arrived == 0) {
    collective.site = site;
    for (int lane = 0; lane < 32; ++lane) slots[lane] = 0xdeadbeefdeadbeefull;
  } else if (!(collective.site == site)) {
    stop("divergent warp collective: lanes at " + collective.site.text() + " and " + site.text());
  }
  slots[thread.lane] = value;
  collective.arrived |= 1u << thread.lane;
  if (orders_memory) release(slots);
  if (collective.arrived == mask) {
    collective.arrived = 0;
    ++collective.generation;
    const unsigned first = thread.linear - thread.lane;
    for (unsigned lane = 0; lane < 32 && first + lane < size_; ++lane) {
      Thread& other = threads_[first + lane];
      if (!(mask >> lane & 1u) || other.wait != Wait::kWarp) continue;
      other.ready = true;
      other.wait = Wait::kNothing;
    }
  } else {
    wait(Wait::kWarp, site);
  }
  if (orders_memory) acquire(slots);
  return slots;
}

void BlockRunner::stop(const std::string& message) {
  char where[96];
  const Thread& thread = self();
  std::snprintf(where, sizeof where, " (block %u,%u thread %u,%u,%u)", tl.bid.x, tl.bid.y,
                thread.tid.x, thread.tid.y, thread.tid.z);
  error_ = message + where;
  leave();
  std::abort();
}

void syncthreads(const char* file, int line) {
  runner->barrier(0, {file, line});
}
int syncthreads_count(int predicate, const char* file, int line) {
  return runner->barrier(predicate, {file, line});
}
const uint64_t* exchange(uint32_t mask, uint64_t value, const char* file, int line,
                         bool orders_memory) {
  return runner->exchange(mask, value, orders_memory, {file, line});
}
uint32_t live_mask() {
  return runner->live_lanes();
}

}  // namespace emu
