// The host's part of a ring: queues of slot indices, and the slots with their headers and tables. The payloads lie in
// the slots as well, or on the consumer's device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "host/lender.hpp"
#include "host/member.hpp"
#include "host/message.hpp"
#include "host/ring_layout.hpp"
#include "host/segment.hpp"

namespace pipex {

/// How many messages a ring holds: `under_way` that are sent and not yet received, and `alive` that the consumer keeps.
struct RingSize {
  std::uint32_t under_way, alive;

  std::uint32_t slots() const { return under_way + alive; }
};

/// The producer's end. It makes the memory of the slots, for the messages that there really are.
class Outbox {
 public:
  /// Opens the ring of the consumer `peer`; `edge` is the header of its messages. Throws InputError if there is none of
  /// this size.
  Outbox(std::shared_ptr<Member> member, int peer, const Address& address, const RingSize& size,
         const MessageHeader& edge);

  /// A free slot; waits only if more than the planned messages are under way. Throws Aborted, or MessageMismatch if the
  /// consumer's memory holds what no pipex writes.
  std::uint32_t take();

  /// The memory of a taken slot, of at least so many bytes. Throws OutOfSharedMemory.
  std::byte* memory(std::uint32_t slot, std::size_t bytes);

  /// Copies a message in and announces it; `tensors` has the addresses of as many as the form has. Throws as `take` and
  /// `memory`.
  void send(const MessageForm& form, const std::vector<std::uintptr_t>& tensors, std::uint64_t step,
            std::uint32_t microbatch);

  /// Announces the message in a taken slot, whose memory has room for its table.
  void publish(std::uint32_t slot, const MessageForm& form, std::uint8_t place, std::uint64_t step,
               std::uint32_t microbatch);

  std::byte* offer() const { return ring_.data() + layout_.offer(); }

  /// Closes the descriptors of memory that the consumer has mapped; every send does so too.
  void close_descriptors();

  /// How often slots had to become larger, the first one not counted, and the bytes of all slots now.
  std::uint64_t grown() const { return grown_; }
  std::size_t bytes() const { return bytes_; }

 private:
  bool collect();
  Segment make(std::size_t bytes) const;
  SlotCell& cell(std::uint32_t slot) const { return *reinterpret_cast<SlotCell*>(ring_.data() + layout_.cell(slot)); }

  const std::shared_ptr<Member> member_;
  const int peer_;
  const RingLayout layout_;
  Segment ring_;
  IndexQueue ready_, free_;
  std::vector<std::uint32_t> stack_;  // free slots; the top came back last
  std::vector<bool> away_;            // slots that the consumer has
  std::vector<std::optional<Segment>> memories_;
  std::vector<std::uint32_t> unopened_;  // slots whose memory the consumer may still have to map
  MessageHeader header_;
  std::size_t room_ = 0;  // of the largest memory until now
  std::uint64_t grown_ = 0;
  std::size_t bytes_ = 0;
};

/// The consumer's end.
class Inbox {
 public:
  Inbox(std::shared_ptr<Member> member, int peer, Lender& lender, const MessageHeader& edge);

  /// Waits for the next message, which stays until pop(). Throws HeaderMismatch, MessageMismatch, InputError,
  /// OutOfSharedMemory (its slot cannot be mapped), Aborted.
  std::uint32_t front(std::uint64_t step, std::uint32_t microbatch);
  void pop();

  /// Of the message at the front: what it is, and where it lies.
  const MessageForm& form() const { return *form_; }
  std::uint8_t place() const { return place_; }

  /// The form, where the caller has not been told of it; else null.
  const MessageForm* news() { return std::exchange(new_form_, false) ? &*form_ : nullptr; }

 private:
  const Segment& memory(std::uint32_t slot) const;
  void read(std::uint32_t slot);

  const std::shared_ptr<Member> member_;
  const int peer_;
  Lender& lender_;
  IndexQueue ready_;
  MessageHeader needed_;
  std::optional<MessageForm> form_;
  std::string table_;  // of the message at the front
  std::uint8_t place_ = kInSlot;
  bool new_form_ = false;  // since the last news()
};

}  // namespace pipex
