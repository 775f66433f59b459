#include "device/trail.hpp"

#include <utility>

namespace pipex::device {

Event Trail::record(StreamHandle stream) {
  std::optional<Event> event;
  {
    const std::lock_guard lock(mutex_);
    if (!spare_.empty()) {
      event.emplace(std::move(spare_.back()));
      spare_.pop_back();
    }
  }
  if (!event) event.emplace(gpu_);
  gpu_->driver().check(gpu_->driver().event_record(event->get(), stream), "cuEventRecord on " + gpu_->name());
  return std::move(*event);
}

EventHandle Trail::begin(int peer, StreamHandle stream) {
  Event reached = record(stream);
  const EventHandle handle = reached.get();
  const std::lock_guard lock(mutex_);
  entries_.push_back({peer, std::move(reached), std::nullopt});
  return handle;
}

void Trail::end(StreamHandle stream) {
  Event passed = record(stream);
  const std::lock_guard lock(mutex_);
  entries_.back().passed = std::move(passed);
}

bool Trail::is_done(const Event& event) const {
  const Result result = gpu_->driver().event_query(event.get());
  if (result == kNotReady) return false;
  gpu_->driver().check(result, "cuEventQuery on " + gpu_->name());
  return true;
}

/// Forgets what has passed; the lock is held.
void Trail::retire() {
  while (!entries_.empty() && entries_.front().passed && is_done(*entries_.front().passed)) {
    spare_.push_back(std::move(entries_.front().reached));
    spare_.push_back(std::move(*entries_.front().passed));
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
  return Oldest{passed_ + 1, entries_.front().peer, is_done(entries_.front().reached)};
}

}  // namespace pipex::device
