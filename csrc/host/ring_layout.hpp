// What lies in the shared memory of a ring: the queues of slot indices, and where each slot's memory is.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "common/named_error.hpp"
#include "host/futex.hpp"
#include "host/segment.hpp"

namespace pipex {

/// Where the memory of a slot is. The producer writes address and generation before it pushes the slot's index.
struct SlotCell {
  std::atomic<std::uint64_t> generation;  // of the memory, from 1; 0: there is none yet
  Address address;
  std::atomic<std::uint64_t> opened;  // the generation that the consumer has mapped
};
static_assert(sizeof(SlotCell) <= 64);

/// Both ends compute the layout from the number of slots; no size or offset is ever read from shared memory.
///
///     ready queue | free queue | a cell for each slot | the consumer's offer of device memory
struct RingLayout {
  std::uint32_t slots;

  std::size_t free_queue() const;
  std::size_t cell(std::uint32_t slot) const;
  std::size_t offer() const { return cell(slots); }
  std::size_t total() const { return offer() + kOfferBytes; }

  static constexpr std::size_t kOfferBytes = 256;
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
