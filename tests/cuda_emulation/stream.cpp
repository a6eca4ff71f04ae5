// A stream whose work is put off.
#include "emulator.h"

namespace emu {

void Stream::run(size_t until) {
  while (done_ < until) {
    const std::function<void()> work = std::move(waiting_.front());
    waiting_.pop_front();
    ++done_;
    work();
  }
}

}  // namespace emu
