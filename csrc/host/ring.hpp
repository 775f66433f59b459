// The messages of one edge, between two processes: the producer copies straight into memory that the consumer maps.
//
//   producer   takes a free slot, writes header, table and tensors, pushes its index ──► `ready`
//   consumer   checks the header, lends the slot to tensors; `free` ◄── its index, when the tensors are gone
//
// The producer takes the slot that came back last: a consumer that keeps up leaves all traffic in one slot that stays
// in the cache, and one that is busy still finds all messages under way waiting for it.
//
// A message says what it is, so nothing is known of sizes beforehand. Where one does not fit into the slot that it
// takes, the producer makes the slot a new memory and says in the slot's cell where; the consumer maps it when it comes
// to the message. So a ring grows without anybody waiting for anybody.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "host/lender.hpp"
#include "host/mailbox.hpp"
#include "host/member.hpp"
#include "host/message.hpp"
#include "host/segment.hpp"

namespace pipex {

/// The consumer's end; makes the ring, but not the memory of its slots.
class RingReceiver {
 public:
  /// Throws OutOfSharedMemory.
  RingReceiver(std::shared_ptr<Member> member, int peer, const RingSize& size, const MessageHeader& edge);

  /// Valid until close_descriptor(), which comes once the producer has opened it.
  Address address() const { return lender_->ring().address(); }
  void close_descriptor() { lender_->ring().close_descriptor(); }

  /// Waits for the next message and checks its header; `form` gets its form where it is another than before. Throws
  /// HeaderMismatch, MessageMismatch, InputError, Aborted.
  Received receive(std::uint64_t step, std::uint32_t microbatch, const MessageForm*& form);

  /// Of the last message.
  const MessageForm& form() const { return inbox_.form(); }

  std::uint32_t lent() { return lender_->lent(); }

 private:
  const std::shared_ptr<Lender> lender_;
  Inbox inbox_;
};

}  // namespace pipex
