// Streams and events of side_stream.h. They are made once, since that takes the driver
// microseconds, and belong to one call at a time.
#include "cuda/side_stream.h"

#include <mutex>
#include <vector>

#include "cuda/platform.cuh"

namespace fastsae::cuda {

struct StreamLane {
  int device = 0;
  cudaStream_t stream = nullptr;
  cudaEvent_t forked = nullptr, joined = nullptr, marks[2] = {};
};

namespace {

std::mutex& idle_mutex() {
  static std::mutex mutex;
  return mutex;
}
std::vector<StreamLane*>& idle_lanes() {
  static auto* lanes = new std::vector<StreamLane*>;  // as long as the process
  return *lanes;
}

// 0: of no capture. A stream that was forked from a captured one belongs to its graph until the
// capture ends, and must not meet other work before.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (cudaStreamGetCaptureInfo(stream, &status, &id) != cudaSuccess) return ~0ull;
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

StreamLane* make_lane(int device) {
  // Making a stream is nothing that a capture records, but it may be refused during one.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  auto* lane = new StreamLane;
  lane->device = device;
  // Its blocks go first when a multiprocessor has room: the other stream waits for them.
  int least = 0, greatest = 0;
  cudaDeviceGetStreamPriorityRange(&least, &greatest);
  cudaStreamCreateWithPriority(&lane->stream, cudaStreamNonBlocking, greatest);
  for (cudaEvent_t* event : {&lane->forked, &lane->joined, &lane->marks[0], &lane->marks[1]}) {
    cudaEventCreateWithFlags(event, cudaEventDisableTiming);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  return lane;
}

StreamLane* take_lane(cudaStream_t main) {
  int device = 0;
  cudaGetDevice(&device);
  const unsigned long long capture = capture_of(main);
  const std::lock_guard<std::mutex> guard(idle_mutex());
  std::vector<StreamLane*>& idle = idle_lanes();
  for (size_t i = 0; i < idle.size(); ++i) {
    StreamLane* lane = idle[i];
    if (lane->device != device) continue;
    const unsigned long long of = capture_of(lane->stream);
    if (of != 0 && of != capture) continue;
    idle.erase(idle.begin() + static_cast<std::ptrdiff_t>(i));
    return lane;
  }
  return make_lane(device);
}

void wait(cudaStream_t waits, cudaEvent_t event, cudaStream_t for_what) {
  cudaEventRecord(event, for_what);
  cudaStreamWaitEvent(waits, event, 0);
}

}  // namespace

// Errors of these calls are those of the next launch, or of join().
SideStream::SideStream(void* main, bool beside) : main_(main), stream_(main) {
  if (!beside) return;
  lane_ = take_lane(static_cast<cudaStream_t>(main));
  stream_ = lane_->stream;
  follow_main();
}

SideStream::~SideStream() {
  if (lane_) join();
}

void SideStream::follow_main() {
  if (lane_) wait(lane_->stream, lane_->forked, static_cast<cudaStream_t>(main_));
}

void SideStream::mark(int name) {
  if (lane_) cudaEventRecord(lane_->marks[name], lane_->stream);
}

void SideStream::main_follows(int name) {
  if (lane_) cudaStreamWaitEvent(static_cast<cudaStream_t>(main_), lane_->marks[name], 0);
}

const char* SideStream::join() {
  if (!lane_) return nullptr;
  StreamLane* lane = lane_;
  lane_ = nullptr;
  stream_ = main_;
  wait(static_cast<cudaStream_t>(main_), lane->joined, lane->stream);
  {
    const std::lock_guard<std::mutex> guard(idle_mutex());
    idle_lanes().push_back(lane);
  }
  return launch_error();
}

}  // namespace fastsae::cuda
