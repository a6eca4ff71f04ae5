// The state behind hopper.h: one for each block that runs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "hopper.h"

namespace emu {

class AsyncUnits {
 public:
  void begin(unsigned threads, uint64_t seed);
  // Lets one copy that was put off happen. False: there is none.
  bool progress();
  // What must not be left behind by a block; empty if nothing is.
  std::string left_behind() const;

  void barrier_init(uint32_t barrier, unsigned arrivals);
  void barrier_arrive(uint32_t barrier, unsigned bytes_expected);
  void barrier_wait(uint32_t barrier, unsigned parity);
  void fence_proxy_async();
  void copy_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier);
  void start_copy(void* to, const void* from, int bytes);
  void close_copies();
  void wait_for_copies(int under_way);
  void wgmma(float* sum, int columns, uint64_t a, uint64_t b, bool add);
  void wgmma_fence();
  void wgmma_commit();
  void wgmma_wait(int most_pending);
  void set_registers(int count);

 private:
  struct Copy {
    uint32_t to;
    TensorMap map;
    int column, row;
    uint32_t barrier;
  };
  // Of one thread: it waits for it itself.
  struct OwnCopy {
    void* to;
    const void* from;
    size_t bytes;
    int group;  // -1: not closed yet
  };
  struct Product {
    float* sum;
    int columns;
    uint64_t a, b;
    bool add;
    int group;  // the commit that closed it; -1: still open
  };
  // What one thread has issued.
  struct Issued {
    std::vector<Product> products;  // under way, oldest first
    int groups = 0;                 // committed so far
    int waits = 0;                  // finished so far by its warp
    bool fenced = false;
    std::map<float*, std::vector<float>> running;  // what the accumulators will be
    std::vector<OwnCopy> copies;                   // under way, oldest first
    int copy_groups = 0;                           // closed so far
  };
  struct WarpState {
    uint64_t issued = 0;  // a digest of its wgmmas: the same for the warps of a warpgroup
    int waits = 0;
    int registers = 0;
  };
  struct BarrierState;

  void touch();
  BarrierState load(uint32_t barrier) const;
  void store(uint32_t barrier, const BarrierState& state);
  void complete(uint32_t barrier, BarrierState state);
  void land(const Copy& copy);
  void finish(unsigned warp, int most_pending);
  void multiply(unsigned warp, size_t which);
  float element(uint64_t descriptor, int row, int k, const char* name) const;

  std::vector<unsigned char> view_;  // shared memory as copies and tensor cores see it
  std::vector<uint32_t> barriers_;
  std::vector<Copy> copies_;
  std::vector<Issued> issued_;
  std::vector<WarpState> warps_;
  uint64_t random_ = 0;
};

}  // namespace emu
