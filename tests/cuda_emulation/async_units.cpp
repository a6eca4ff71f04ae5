#include "async_units.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "block.h"

namespace emu {
namespace {

// Where dynamic shared memory starts. Kernels may rely on 16 bytes only.
constexpr uint32_t kSharedBase = 1024 + 16;
constexpr uint64_t kMostCount = (1 << 20) - 1;  // arrivals, and bytes under way, of a barrier
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

[[noreturn]] void stop(const std::string& message) {
  if (tl.cur) runner->stop(message);
  throw std::runtime_error(message);  // no thread runs: a copy that was put off
}

unsigned char* at(uint32_t address, size_t bytes, const char* what) {
  if (address < kSharedBase || address + bytes > kSharedBase + tl.dyn_smem_bytes) {
    stop(std::string(what) + " outside of dynamic shared memory");
  }
  return tl.dyn_smem + (address - kSharedBase);
}

// The 128-byte swizzle: a function of the address itself.
uint32_t swizzle(uint32_t address) {
  return address ^ ((address >> 7 & 7) << 4);
}

float bfloat16(const unsigned char* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  return unpack<float>(static_cast<uint64_t>(bits) << 16);
}

}  // namespace

// 64 bits in shared memory. The highest is 0, so memory that nobody initialized is no barrier.
struct AsyncUnits::BarrierState {
  uint64_t pending, arrivals, bytes;
  bool shown, phase;

  static BarrierState unpacked(uint64_t word) {
    return {word & kMostCount, word >> 20 & kMostCount, word >> 40 & kMostCount,
            (word >> 60 & 1) != 0, (word >> 61 & 1) != 0};
  }
  uint64_t packed() const {
    return pending | arrivals << 20 | bytes << 40 | uint64_t{shown} << 60 | uint64_t{phase} << 61;
  }
};

void AsyncUnits::begin(unsigned threads, uint64_t seed) {
  view_.clear();
  barriers_.clear();
  copies_.clear();
  issued_.assign(threads, {});
  warps_.assign((threads + 31) / 32, {});
  random_ = seed;
}

// Until then nothing of this is used, and costs nothing.
void AsyncUnits::touch() {
  if (view_.empty()) view_.assign(tl.dyn_smem_bytes, 0xff);
}

std::string AsyncUnits::left_behind() const {
  if (!copies_.empty()) return "the block ended while a copy into its shared memory was under way";
  for (const Issued& issued : issued_) {
    if (!issued.products.empty()) return "a thread ended without waiting for its wgmma";
    if (!issued.copies.empty()) return "a thread ended without waiting for its copies";
  }
  int registers = 0;
  bool all = true;
  for (size_t w = 0; w < warps_.size(); ++w) {
    const WarpState &own = warps_[w], &first = warps_[w / 4 * 4];
    if (own.issued != first.issued) return "the warps of a warpgroup issued different wgmmas";
    if (own.registers != first.registers) {
      return "the warps of a warpgroup asked for different numbers of registers";
    }
    registers += 32 * own.registers;
    all = all && own.registers != 0;
  }
  if (all && registers > 64 * 1024) return "the warps asked for more registers than there are";
  return {};
}

// ---- barriers ----

AsyncUnits::BarrierState AsyncUnits::load(uint32_t barrier) const {
  if (barrier % 8) stop("an mbarrier that is not aligned to 8 bytes");
  uint64_t word;
  std::memcpy(&word, at(barrier, 8, "an mbarrier"), 8);
  if (word >> 62) stop("an mbarrier that was not initialized, or was written over");
  return BarrierState::unpacked(word);
}

void AsyncUnits::store(uint32_t barrier, const BarrierState& state) {
  const uint64_t word = state.packed();
  std::memcpy(at(barrier, 8, "an mbarrier"), &word, 8);
}

void AsyncUnits::barrier_init(uint32_t barrier, unsigned arrivals) {
  touch();
  if (arrivals == 0 || arrivals > kMostCount) stop("an mbarrier of no arrivals, or too many");
  if (barrier % 8) stop("an mbarrier that is not aligned to 8 bytes");
  store(barrier, {arrivals, arrivals, 0, false, false});
  barriers_.push_back(barrier);
}

// Ends the phase if nothing is missing; takes the state over.
void AsyncUnits::complete(uint32_t barrier, BarrierState state) {
  if (state.pending == 0 && state.bytes == 0) {
    state.pending = state.arrivals;
    state.phase = !state.phase;
    store(barrier, state);
    runner->wake(barrier);
  } else {
    store(barrier, state);
  }
}

// Two addresses for each barrier, in turn: see BlockRunner::barrier_order_.
static void* order_of(uint32_t barrier, bool phase) {
  return tl.dyn_smem + (barrier - kSharedBase) + phase;
}

void AsyncUnits::barrier_arrive(uint32_t barrier, unsigned bytes_expected) {
  BarrierState state = load(barrier);
  state.bytes += bytes_expected;
  if (state.bytes > kMostCount) stop("more bytes than an mbarrier counts");
  if (state.pending == 0) stop("more arrivals at an mbarrier than its phase has");
  --state.pending;
  release(order_of(barrier, state.phase));
  complete(barrier, state);
}

void AsyncUnits::barrier_wait(uint32_t barrier, unsigned parity) {
  if (parity > 1) stop("a parity other than 0 and 1");
  const bool phase = parity != 0;
  while (load(barrier).phase == phase) runner->wait_for(barrier, phase);
  acquire(order_of(barrier, phase));
}

// ---- copies ----

void AsyncUnits::fence_proxy_async() {
  touch();
  std::memcpy(view_.data(), tl.dyn_smem, view_.size());
  for (const uint32_t barrier : barriers_) {
    BarrierState state = load(barrier);
    state.shown = true;
    store(barrier, state);
  }
}

void AsyncUnits::copy_tile(uint32_t to, const TensorMap& map, int column, int row,
                           uint32_t barrier) {
  touch();
  if (to % 128) stop("a bulk copy to an address that is not a multiple of 128");
  if (!load(barrier).shown) stop("a bulk copy on an mbarrier that no fence has shown to it");
  at(to, static_cast<size_t>(map.box_rows) * static_cast<size_t>(map.box_columns) * 2,
     "a bulk copy");
  const Copy copy{to, map, column, row, barrier};
  random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
  if (random_ >> 63) land(copy);
  else copies_.push_back(copy);
}

bool AsyncUnits::progress() {
  if (copies_.empty()) return false;
  const Copy latest = copies_.back();  // copies need not arrive in the order they were issued in
  copies_.pop_back();
  land(latest);
  return true;
}

void AsyncUnits::land(const Copy& copy) {
  const TensorMap& m = copy.map;
  for (int r = 0; r < m.box_rows; ++r) {
    for (int c = 0; c < m.box_columns; ++c) {
      const int64_t row = int64_t{copy.row} + r, column = int64_t{copy.column} + c;
      unsigned char element[2] = {0, 0};
      if (row >= 0 && row < m.rows && column >= 0 && column < m.columns) {
        std::memcpy(element, m.base + row * m.pitch + 2 * column, 2);
      }
      uint32_t to = copy.to + 2 * static_cast<uint32_t>(r * m.box_columns + c);
      if (m.swizzled) to = swizzle(to);
      std::memcpy(at(to, 2, "a bulk copy"), element, 2);
      std::memcpy(&view_[to - kSharedBase], element, 2);
    }
  }
  BarrierState state = load(copy.barrier);
  const uint64_t bytes = 2 * static_cast<uint64_t>(m.box_rows * m.box_columns);
  // The hardware would let this phase, or a later one, end at the wrong moment.
  if (bytes > state.bytes) stop("a bulk copy brought more bytes than its mbarrier expects");
  state.bytes -= bytes;
  complete(copy.barrier, state);
}

void AsyncUnits::start_copy(void* to, const void* from, int bytes) {
  const size_t size = static_cast<size_t>(bytes);
  if (bytes != 4 && bytes != 8 && bytes != 16) stop("a copy of no such size");
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size) {
    stop("a copy that is not aligned to its size");
  }
  const auto begin = static_cast<unsigned char*>(to) - tl.dyn_smem;
  if (begin < 0 || static_cast<size_t>(begin) + size > tl.dyn_smem_bytes) {
    stop("a copy to something that is not in dynamic shared memory");
  }
  random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
  if (random_ >> 63) {
    std::memcpy(to, from, size);
    return;
  }
  std::memset(to, 0xff, size);
  issued_[tl.cur->linear].copies.push_back({to, from, size, -1});
}

void AsyncUnits::close_copies() {
  Issued& own = issued_[tl.cur->linear];
  for (OwnCopy& copy : own.copies) {
    if (copy.group < 0) copy.group = own.copy_groups;
  }
  ++own.copy_groups;
}

void AsyncUnits::wait_for_copies(int under_way) {
  Issued& own = issued_[tl.cur->linear];
  const auto waited = [&](const OwnCopy& copy) {
    return copy.group >= 0 && copy.group < own.copy_groups - under_way;
  };
  for (const OwnCopy& copy : own.copies) {
    if (waited(copy)) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  std::erase_if(own.copies, waited);
}

// ---- products ----

void AsyncUnits::wgmma_fence() {
  issued_[tl.cur->linear].fenced = true;
}

void AsyncUnits::wgmma(float* sum, int columns, uint64_t a, uint64_t b, bool add) {
  touch();
  Issued& own = issued_[tl.cur->linear];
  if (columns % 8 || columns < 8 || columns > 256) stop("a wgmma of no such width");
  const auto found = own.running.find(sum);
  if (found == own.running.end()) {
    // Accumulators that threads may have written: a fence has to come between.
    if (!own.fenced) stop("a wgmma without wgmma.fence before it");
    own.running[sum].assign(sum, sum + columns / 2);
    std::fill_n(sum, columns / 2, kNaN);
  } else if (found->second.size() != static_cast<size_t>(columns / 2)) {
    stop("accumulators of a wgmma that is under way, in another shape");
  }
  own.products.push_back({sum, columns, a, b, add, -1});
  if (tl.cur->lane == 0) {
    uint64_t& digest = warps_[tl.cur->warp].issued;
    for (const uint64_t part : {a, b, static_cast<uint64_t>(columns), uint64_t{add}}) {
      digest = (digest ^ part) * 1099511628211ull + 1;
    }
  }
}

void AsyncUnits::wgmma_commit() {
  Issued& own = issued_[tl.cur->linear];
  for (Product& product : own.products) {
    if (product.group < 0) product.group = own.groups;
  }
  ++own.groups;
}

void AsyncUnits::wgmma_wait(int most_pending) {
  const unsigned warp = tl.cur->warp;
  runner->exchange(0xffffffffu, static_cast<uint64_t>(most_pending), false,
                   {"wgmma.wait_group", most_pending});
  // Whoever goes on first finishes for all lanes: none of them has been told yet.
  Issued& own = issued_[tl.cur->linear];
  if (own.waits++ == warps_[warp].waits) {
    ++warps_[warp].waits;
    finish(warp, most_pending);
  }
  // What was committed is no longer the last word on these registers.
  if (own.running.empty()) own.fenced = false;
}

// Computes the products of a warp in all but its most_pending last groups: as late as can be.
void AsyncUnits::finish(unsigned warp, int most_pending) {
  const size_t first = size_t{32} * warp;
  const Issued& lane0 = issued_[first];
  size_t done = 0;
  while (done < lane0.products.size() && lane0.products[done].group >= 0 &&
         lane0.products[done].group < lane0.groups - most_pending) {
    multiply(warp, done++);
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    Issued& own = issued_[first + lane];
    own.products.erase(own.products.begin(),
                       own.products.begin() + static_cast<std::ptrdiff_t>(done));
    for (auto it = own.running.begin(); it != own.running.end();) {
      const bool pending = std::any_of(own.products.begin(), own.products.end(),
                                       [&](const Product& p) { return p.sum == it->first; });
      if (!pending) std::copy(it->second.begin(), it->second.end(), it->first);
      it = pending ? std::next(it) : own.running.erase(it);
    }
  }
}

// Element (row, k) of an operand, found the way the hardware does: from the bits of its descriptor.
float AsyncUnits::element(uint64_t descriptor, int row, int k, const char* name) const {
  const auto field = [&](int low, int bits) {
    return static_cast<uint32_t>(descriptor >> low & ((uint64_t{1} << bits) - 1));
  };
  const uint32_t start = field(0, 14) << 4, leading = field(16, 14) << 4;
  const uint32_t stride = field(32, 14) << 4, base_offset = field(49, 3), mode = field(62, 2);
  const uint32_t group = static_cast<uint32_t>(row) / 8, in_group = static_cast<uint32_t>(row) % 8;
  const uint32_t byte = 2 * static_cast<uint32_t>(k);
  uint32_t address;
  if (mode == 1) {  // rows of 128 bytes, 8 of them to a pattern
    if (base_offset || (start >> 7 & 7)) stop(std::string(name) + " starts within a pattern");
    address = swizzle(start + group * stride + in_group * 128 + byte);
  } else if (mode == 0) {  // 8 rows of 16 bytes, one after another
    address = start + group * stride + byte / 16 * leading + in_group * 16 + byte % 16;
  } else {
    stop(std::string(name) + " has a swizzle that is not emulated");
  }
  at(address, 2, name);
  return bfloat16(&view_[address - kSharedBase]);
}

// Each sum is taken in ascending k, on top of what is there; products are exact in float32.
void AsyncUnits::multiply(unsigned warp, size_t which) {
  const size_t first = size_t{32} * warp;
  const Product product = issued_[first].products[which];
  const int columns = product.columns;
  float a[16][16];
  std::vector<float> b(static_cast<size_t>(16 * columns)), sums(static_cast<size_t>(columns));
  for (int r = 0; r < 16; ++r) {
    const int row = 16 * static_cast<int>(warp % 4) + r;
    for (int k = 0; k < 16; ++k) a[r][k] = element(product.a, row, k, "operand A of a wgmma");
  }
  for (int c = 0; c < columns; ++c) {
    for (int k = 0; k < 16; ++k) {
      b[static_cast<size_t>(k * columns + c)] = element(product.b, c, k, "operand B of a wgmma");
    }
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    const std::vector<Product>& theirs = issued_[first + lane].products;
    if (which >= theirs.size() || theirs[which].a != product.a || theirs[which].b != product.b ||
        theirs[which].columns != columns || theirs[which].group != product.group) {
      stop("the lanes of a warp issued different wgmmas");
    }
  }
  // Lane l holds, of 8 columns from 8 j on, columns 2 (l % 4) and one more, of rows l / 4 and
  // l / 4 + 8.
  const auto number = [&](int r, int c) -> float& {
    Issued& owner = issued_[first + static_cast<size_t>(r % 8 * 4 + c % 8 / 2)];
    std::vector<float>& running = owner.running[owner.products[which].sum];
    return running[static_cast<size_t>(c / 8 * 4 + r / 8 * 2 + c % 2)];
  };
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < columns; ++c) {
      sums[static_cast<size_t>(c)] = product.add ? number(r, c) : 0.0f;
    }
    for (int k = 0; k < 16; ++k) {
      const float factor = a[r][k];
      const float* row = &b[static_cast<size_t>(k * columns)];
      for (int c = 0; c < columns; ++c) sums[static_cast<size_t>(c)] += factor * row[c];
    }
    for (int c = 0; c < columns; ++c) number(r, c) = sums[static_cast<size_t>(c)];
  }
}

void AsyncUnits::set_registers(int count) {
  if (count % 8 || count < 24 || count > 256) stop("setmaxnreg: no such number of registers");
  warps_[tl.cur->warp].registers = count;
}

// ---- what kernels call ----

uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - tl.dyn_smem;
  if (!tl.dyn_smem || offset < 0 || offset > static_cast<std::ptrdiff_t>(tl.dyn_smem_bytes)) {
    stop("the address of something that is not in dynamic shared memory");
  }
  return kSharedBase + static_cast<uint32_t>(offset);
}
void barrier_init(uint32_t barrier, unsigned arrivals) {
  runner->units().barrier_init(barrier, arrivals);
}
void barrier_arrive(uint32_t barrier, unsigned bytes_expected) {
  runner->units().barrier_arrive(barrier, bytes_expected);
}
void barrier_wait(uint32_t barrier, unsigned parity) {
  runner->units().barrier_wait(barrier, parity);
}
void fence_proxy_async() {
  runner->units().fence_proxy_async();
}
void copy_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  runner->units().copy_tile(to, map, column, row, barrier);
}
void start_copy(void* to, const void* from, int bytes) {
  runner->units().start_copy(to, from, bytes);
}
void close_copies() {
  runner->units().close_copies();
}
void wait_for_copies(int under_way) {
  runner->units().wait_for_copies(under_way);
}
void wgmma(float* sum, int columns, uint64_t a, uint64_t b, bool add) {
  runner->units().wgmma(sum, columns, a, b, add);
}
void wgmma_fence() {
  runner->units().wgmma_fence();
}
void wgmma_commit() {
  runner->units().wgmma_commit();
}
void wgmma_wait(int most_pending) {
  runner->units().wgmma_wait(most_pending);
}
void set_registers(int count) {
  runner->units().set_registers(count);
}

}  // namespace emu
