// Messages on their way through streams, oldest first, each with an event behind it.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "device/context.hpp"

namespace pipex::device {

/// Filled by the rank's own thread; looked at by others too.
class Trail {
 public:
  /// The oldest message that has not passed: its number, and the rank whose doing it may be.
  struct Oldest {
    std::uint64_t number;
    int peer;
  };

  explicit Trail(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

  /// Call before the message's first operation is enqueued: that alone may block.
  void begin(int peer);

  /// Call behind its last one. Returns the message's number, counted from 1.
  std::uint64_t end(StreamHandle stream);

  /// How many messages have passed, in order.
  std::uint64_t passed();

  std::optional<Oldest> oldest();

 private:
  struct Entry {
    int peer;
    std::optional<Event> event;  // none yet: between begin and end
  };

  void retire();

  const std::shared_ptr<const Gpu> gpu_;
  std::mutex mutex_;  // never held while something is enqueued
  std::deque<Entry> entries_;
  std::vector<Event> spare_;
  std::uint64_t passed_ = 0;
};

}  // namespace pipex::device
