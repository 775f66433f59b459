// The host's part of a ring: queues of slot indices and a header for every slot, wherever the payloads lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "host/lender.hpp"
#include "host/member.hpp"
#include "host/ring_layout.hpp"
#include "host/segment.hpp"
#include "host/tensor_template.hpp"

namespace pipex {

/// How many tensors of at most `bytes` a ring holds: `under_way` that are sent and not yet received, and `alive` that
/// the consumer keeps.
struct RingSize {
  std::size_t bytes;
  std::uint32_t under_way, alive;

  std::uint32_t slots() const { return under_way + alive; }
};

/// The producer's end.
class Outbox {
 public:
  /// Opens the ring of the consumer `peer`. Throws InputError if there is none of this layout.
  Outbox(std::shared_ptr<Member> member, int peer, const Address& address, const RingLayout& layout);

  /// A free slot; waits only if more than the planned messages are under way. Throws Aborted, or MessageMismatch if the
  /// consumer's memory holds what no pipex writes.
  std::uint32_t take();

  /// Announces the message in a taken slot.
  void publish(std::uint32_t slot, const TensorTemplate& tensor, std::uint64_t step, std::uint32_t microbatch);

  std::byte* payload(std::uint32_t slot) const { return segment_.data() + layout_.payload(slot); }

 private:
  bool collect();

  const std::shared_ptr<Member> member_;
  const int peer_;
  const RingLayout layout_;
  Segment segment_;
  IndexQueue ready_, free_;
  std::vector<std::uint32_t> stack_;  // free slots; the top came back last
  std::vector<bool> away_;            // slots that the consumer has
  std::uint64_t sequence_ = 0;
};

/// The consumer's end.
class Inbox {
 public:
  Inbox(std::shared_ptr<Member> member, int peer, Lender& lender, std::uint32_t slots);

  /// Waits for the next message, which stays until pop(). Throws HeaderMismatch, MessageMismatch, Aborted.
  std::uint32_t front(const TensorTemplate& tensor, std::uint64_t step, std::uint32_t microbatch);
  void pop();

 private:
  const std::shared_ptr<Member> member_;
  const int peer_;
  Lender& lender_;
  IndexQueue ready_;
  std::uint64_t sequence_ = 0;
};

}  // namespace pipex
