#include "device/trail.hpp"

#include <utility>

namespace pipex::device {

void Trail::begin(int peer) {
  const std::lock_guard lock(mutex_);
  entries_.push_back({peer, std::nullopt});
}

std::uint64_t Trail::end(StreamHandle stream) {
  std::optional<Event> event;
  {
    const std::lock_guard lock(mutex_);
    if (!spare_.empty()) {
      event.emplace(std::move(spare_.back()));
      spare_.pop_back();
    }
  }
  if (!event) event.emplace(gpu_);
  const Driver& driver = gpu_->driver();
  driver.check(driver.event_record(event->get(), stream), "cuEventRecord on " + gpu_->name());
  const std::lock_guard lock(mutex_);
  entries_.back().event = std::move(event);
  return passed_ + entries_.size();
}

/// Forgets what has passed; the lock is held.
void Trail::retire() {
  while (!entries_.empty() && entries_.front().event) {
    const Result result = gpu_->driver().event_query(entries_.front().event->get());
    if (result == kNotReady) return;
    gpu_->driver().check(result, "cuEventQuery on " + gpu_->name());
    spare_.push_back(std::move(*entries_.front().event));
    entries_.pop_front();
    ++passed_;
  }
}

std::uint64_t Trail::passed() {
  const std::lock_guard lock(mutex_);
  retire();
  return passed_;
}

std::optional<Trail::Oldest> Trail::oldest() {
  const std::lock_guard lock(mutex_);
  retire();
  if (entries_.empty()) return std::nullopt;
  return Oldest{passed_ + 1, entries_.front().peer};
}

}  // namespace pipex::device
