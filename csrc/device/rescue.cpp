#include "device/rescue.hpp"

#include <csignal>
#include <utility>

#include "common/named_error.hpp"

namespace pipex::device {

Rescue::Rescue(std::shared_ptr<const Gpu> gpu, std::shared_ptr<Member> member, Trail& receives, Trail& sends)
    : gpu_(std::move(gpu)),
      member_(std::move(member)),
      receives_(receives),
      sends_(sends),
      stream_(gpu_, Urgency::rescue) {
  sigset_t all, before;  // signals are for the interpreter's threads
  sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread(&Rescue::run, this);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Rescue::~Rescue() {
  if (!gpu_->is_ours()) {
    thread_.detach();
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

Rescue::Ticket Rescue::watch(const Flags& flags) {
  const std::lock_guard lock(mutex_);
  return flags_.insert(flags_.end(), flags);
}

void Rescue::forget(Ticket ticket) {
  const std::lock_guard lock(mutex_);
  flags_.erase(ticket);
}

void Rescue::run() {
  std::unique_lock lock(mutex_);
  try {
    const Current current(*gpu_);
    // Else, while any other thread captures a graph, the driver refuses this one's questions and spoils that graph.
    CaptureMode mode = kCaptureOfThread;
    gpu_->driver().check(gpu_->driver().thread_capture_mode(&mode), "cuThreadExchangeStreamCaptureMode");
    while (!changed_.wait_for(lock, kSlice, [this] { return stop_; })) {
      if (member_->control().aborted()) {
        release_all();
      } else {
        lock.unlock();
        look();
        lock.lock();
      }
    }
  } catch (const std::exception& error) {
    // The device is broken, and the main thread's next call will say so; others need not wait for that.
    member_->control().record(member_->rank(), Ending::failed, member_->rank(), error.what());
  }
}

/// The lock is held, so that no flag goes away meanwhile. Errors are the main thread's to tell.
void Rescue::release_all() {
  if (gpu_->driver().stream_query(stream_.get()) == kNotReady) return;  // the last round is still under way
  for (const Flags& flags : flags_)
    for (std::uint32_t i = 0; i < flags.count; ++i)
      gpu_->driver().stream_write(stream_.get(), flags.first + i * flags.stride, kReleaseAll, kWriteWithFence);
}

void Rescue::look() {
  Control& control = member_->control();
  RankPart& part = control.part(member_->rank());
  part.device_progress.store(receives_.passed() + sends_.passed());
  auto awaited = receives_.oldest();
  if (!awaited || !awaited->reached) awaited = sends_.oldest();
  if (awaited && !awaited->reached) awaited.reset();  // the GPU computes
  part.device_waiting_on.store(awaited ? awaited->peer + 1 : 0);
  if (awaited != awaited_ || !awaited) patience_.reset();
  awaited_ = awaited;
  if (!awaited) return;
  if (!patience_) patience_.emplace(control, member_->rank(), awaited->peer, member_->timeout());
  try {
    patience_->check();
  } catch (const Aborted&) {  // the record is what counts
  }
}

}  // namespace pipex::device
