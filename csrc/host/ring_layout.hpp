// What lies in the shared memory of a ring, and the queues of slot indices in it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "host/errors.hpp"
#include "host/futex.hpp"

namespace pipex {

/// Both ends compute the layout from the edge; no size or offset is ever read from shared memory.
///
///     ready queue | free queue | one header per slot | one payload per slot
struct RingLayout {
  std::size_t slot_bytes;
  std::uint32_t slots;

  std::size_t free_queue() const;
  std::size_t header(std::uint32_t slot) const;
  std::size_t payload(std::uint32_t slot) const;
  std::size_t total() const { return payload(slots); }
};

/// One end of a queue of slot indices in shared memory, with one writer and one reader.
///
/// A cell holds (lap << 32 | index), so a reader sees in one load whether the cell is new. There are as many cells as
/// slots and a slot is in one place at a time, so the queue is never full.
class IndexQueue {
 public:
  IndexQueue(std::byte* place, std::uint32_t cells);

  Doorbell& bell() { return *bell_; }

  /// Writer's end: publishes everything written before, and wakes the reader.
  void push(std::uint32_t index);

  /// Reader's end: the next index, which stays until pop(). Throws MessageMismatch if no pipex wrote this cell.
  std::optional<std::uint32_t> peek() const;
  void pop() { advance(); }

 private:
  void advance();

  Doorbell* bell_;
  std::atomic<std::uint64_t>* cells_;
  std::uint32_t count_;
  std::uint32_t next_ = 0;
  std::uint32_t lap_ = 1;  // memory starts as lap 0
};

/// The error for shared memory in which the peer wrote something impossible.
NamedError corrupt_ring(const std::string& got, const std::string& needed);

}  // namespace pipex
