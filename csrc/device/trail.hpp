// Messages on their way through streams, oldest first, each with an event before and one behind it.
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
  /// The oldest message that has not passed. Once its stream has reached it, it waits for `peer`; until then, for what
  /// this process has enqueued before it.
  struct Oldest {
    std::uint64_t number;
    int peer;
    bool reached;
    bool operator==(const Oldest&) const = default;
  };

  explicit Trail(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

  /// Call before the operations of a message are enqueued: it is reached when those before it have passed and all that
  /// `stream` holds now is done. Returns the event behind that.
  EventHandle begin(int peer, StreamHandle stream);

  /// Call after.
  void end(StreamHandle stream);

  /// How many messages have passed, in order.
  std::uint64_t passed();

  std::optional<Oldest> oldest();

 private:
  struct Entry {
    int peer;
    Event reached;
    std::optional<Event> passed;  // none yet: between begin and end
  };

  Event record(StreamHandle stream);
  bool is_done(const Event& event) const;
  void retire();

  const std::shared_ptr<const Gpu> gpu_;
  std::mutex mutex_;  // never held while something is enqueued
  std::deque<Entry> entries_;
  std::vector<Event> spare_;
  std::uint64_t passed_ = 0;
};

}  // namespace pipex::device
