// One tensor of one edge, between two processes: the producer copies straight into a slot of the consumer's memory.
//
//   producer   takes a free slot, writes header and payload, pushes its index ──► `ready`
//   consumer   checks the header, lends the slot to a tensor; `free` ◄── its index, when the tensor is gone
//
// The producer takes the slot that came back last: a consumer that keeps up leaves all traffic in one slot that stays
// in the cache, and one that is busy still finds all messages under way waiting for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "host/lender.hpp"
#include "host/mailbox.hpp"
#include "host/member.hpp"
#include "host/segment.hpp"
#include "host/tensor_template.hpp"

namespace pipex {

/// The producer's end.
class RingSender {
 public:
  /// Opens the ring of the consumer `peer`. Throws InputError if there is none of this size.
  RingSender(std::shared_ptr<Member> member, int peer, const Address& address, const RingSize& size);

  /// Copies a tensor in; waits only if more than the planned messages are under way. Throws Aborted, or
  /// MessageMismatch if the consumer's memory holds what no pipex writes.
  void send(const TensorTemplate& tensor, const std::byte* data, std::uint64_t step, std::uint32_t microbatch);

 private:
  const std::size_t bytes_;
  Outbox outbox_;
};

/// The consumer's end; makes the ring's memory.
class RingReceiver {
 public:
  /// Throws OutOfSharedMemory.
  RingReceiver(std::shared_ptr<Member> member, int peer, const RingSize& size);

  /// Valid until close_descriptor(), which comes once the producer has opened it.
  Address address() const { return lender_->segment().address(); }
  void close_descriptor() { lender_->segment().close_descriptor(); }

  /// Waits for the next tensor and checks its header. Throws HeaderMismatch, MessageMismatch, Aborted.
  LoanPtr receive(const TensorTemplate& tensor, std::uint64_t step, std::uint32_t microbatch);

  std::uint32_t lent() { return lender_->lent(); }

 private:
  const std::size_t bytes_;
  const std::shared_ptr<HostLender> lender_;
  Inbox inbox_;
};

}  // namespace pipex
