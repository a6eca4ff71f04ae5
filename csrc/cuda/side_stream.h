// A second stream that works beside the current one for a while: it is forked from it with an event
// and joined with one, so that both can be captured in a graph. No torch, no CUDA.
#pragma once

namespace fastsae::cuda {

struct StreamLane;  // a stream and its events, kept for the next one who needs them

class SideStream {
 public:
  // Beside `main` (a cudaStream_t); or, where `beside` is false, `main` itself, and nothing below
  // does anything.
  SideStream(void* main, bool beside);
  ~SideStream();
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  void* stream() const { return stream_; }
  // What this stream gets next starts when what `main` got so far is done.
  void follow_main();
  // Names what this stream got so far: 0 or 1, the last one of each counts.
  void mark(int name);
  // What `main` gets next starts when that is done.
  void main_follows(int name);
  // The same for all that this stream got; at the latest the destructor does it, so memory that was
  // allocated before and is freed after may be reused on `main`. The CUDA error's text, or null.
  const char* join();

 private:
  void* main_;
  void* stream_;
  StreamLane* lane_ = nullptr;
};

}  // namespace fastsae::cuda
