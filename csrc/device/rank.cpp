#include "device/rank.hpp"

#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

#include "common/named_error.hpp"

namespace pipex::device {
namespace {

constexpr auto kSelfTest = std::chrono::seconds(1);
constexpr auto kDrain = std::chrono::seconds(2);  // after the run's end; the rescue thread frees streams every 20 ms
constexpr auto kPause = std::chrono::microseconds(50);

/// Host memory that streams can wait for.
class HostFlags {
 public:
  HostFlags(const Driver& driver, std::size_t count) : driver_(driver) {
    driver_.check(driver_.host_allocate(&memory_, count * sizeof(std::uint64_t), kHostMemoryMapped), "cuMemHostAlloc");
    for (std::size_t i = 0; i < count; ++i) store(i, 0);
  }
  ~HostFlags() { driver_.host_free(memory_); }
  HostFlags(const HostFlags&) = delete;
  HostFlags& operator=(const HostFlags&) = delete;

  // The same address on the device: unified addressing has been asked for.
  DevicePointer address(std::size_t i) const {
    return reinterpret_cast<std::uintptr_t>(static_cast<std::uint64_t*>(memory_) + i);
  }
  void store(std::size_t i, std::uint64_t value) {
    std::atomic_ref(static_cast<std::uint64_t*>(memory_)[i]).store(value);
  }

 private:
  const Driver& driver_;
  void* memory_ = nullptr;
};

}  // namespace

Rank::Rank(std::shared_ptr<Member> member, const std::string& library, int ordinal, dlpack::Device device)
    : member_(std::move(member)),
      gpu_(std::make_shared<const Gpu>(library, ordinal)),
      device_(device),
      send_stream_(gpu_, Urgency::send),
      receives_(gpu_),
      sends_(gpu_) {
  rescue_.emplace(gpu_, member_, receives_, sends_);
}

Rank::~Rank() = default;

std::string Rank::missing() {
  if (gpu_->attribute(kUnifiedAddressing) == 0) return gpu_->name() + " shares no address space with the host";
  if (gpu_->attribute(kStreamMemOps64) == 0) return gpu_->name() + " has no 64-bit stream memory operations";
  return self_test();
}

std::string Rank::self_test() {
  const Current current(*gpu_);
  const Stream compute(gpu_, Urgency::compute);
  HostFlags flags(driver(), 2);
  const StreamHandle streams[] = {compute.get(), send_stream_.get()};
  for (int i = 0; i < 2; ++i)
    driver().check(driver().stream_wait(streams[i], flags.address(i), 1, kWaitGreaterOrEqual), "cuStreamWaitValue64");
  for (int i = 0; i < 2; ++i)
    driver().check(driver().stream_write(ready_stream().get(), flags.address(i), kReleaseAll, kWriteWithFence),
                   "cuStreamWriteValue64");
  const auto free = [&](StreamHandle stream) { return driver().stream_query(stream) != kNotReady; };
  bool passed = false;
  for (const auto until = std::chrono::steady_clock::now() + kSelfTest; std::chrono::steady_clock::now() < until;) {
    passed = free(streams[0]) && free(streams[1]);
    if (passed) break;
    std::this_thread::sleep_for(kPause);
  }
  for (int i = 0; i < 2; ++i) flags.store(i, 1);  // by the processor: nothing may stay blocked
  for (const StreamHandle stream : streams) driver().check(driver().stream_synchronize(stream), "cuStreamSynchronize");
  ready_stream().synchronize();
  return passed ? "" : "on " + gpu_->name() + " a stream that waits is not freed by another one";
}

void Rank::check_not_capturing(StreamHandle stream) const {
  CaptureStatus status{};
  const Result result = driver().stream_capturing(stream, &status);
  if (result == kSuccess && status == kNotCapturing) return;
  if (result != kSuccess && result != kCaptureImplicit) driver().check(result, "cuStreamIsCapturing");
  throw NamedError("InputError", "a tensor cannot cross ranks while a CUDA graph is being captured",
                   "a capturing compute stream", "one that is not",
                   "capture parts of a stage only, without its receives and sends");
}

void Rank::flush() {
  const Current current(*gpu_);
  while (const auto oldest = sends_.oldest())
    member_->wait_polling(oldest->reached ? oldest->peer : kNobody, [&] { return sends_.oldest() != oldest; });
  member_->control().raise_if_aborted();  // else the rescue may be what has let them pass
}

std::uint64_t Rank::sent() {
  const Current current(*gpu_);
  return sends_.passed();
}

bool Rank::drain(StreamHandle stream) noexcept {
  try {
    const Current current(*gpu_);
    for (;;) {
      if (driver().stream_query(stream) != kNotReady) return true;  // done, or no longer a stream
      const auto now = std::chrono::steady_clock::now();
      if (!draining_since_ && member_->control().aborted()) draining_since_ = now;
      if (draining_since_ && now - *draining_since_ > kDrain) return false;
      std::this_thread::sleep_for(kPause);
    }
  } catch (const std::exception&) {  // no context to make current: the driver is gone, and its streams with it
    return true;
  }
}

Rescue::Ticket Rank::watch(const OwnMemory& memory, std::uint32_t slots) {
  return rescue_->watch({memory.flag(0), memory.flag(1) - memory.flag(0), slots});
}

void Rank::forget(Rescue::Ticket ticket) {
  if (rescue_) rescue_->forget(ticket);
}

void Rank::retire(std::shared_ptr<OwnMemory> memory) {
  const std::lock_guard lock(retiring_);
  retired_.push_back(std::move(memory));
}

void Rank::free_retired() {
  const std::lock_guard lock(retiring_);
  retired_.clear();
}

void Rank::close() { rescue_.reset(); }

}  // namespace pipex::device
