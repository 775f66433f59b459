// The messages of one edge, between two processes of one host that have a GPU each (or share one).
//
//   consumer's device   written[slot], and the slots' payloads  the producer's send stream writes both
//   producer's device   released[slot]                          the consumer's compute stream writes it
//   host                queues, headers, tables                 as for tensors in host memory (host/mailbox.hpp)
//
// A message that does not fit into the payloads, as the first one, goes through the slot's host memory, which grows by
// itself (host/ring.hpp). On receiving it the consumer makes larger payloads and offers them in the ring; the producer
// maps what is offered when it sends the next time. The header says of which of these generations a payload is. None is
// freed before the ring is: there is a handful at most, each half as large again as the one before it. Where there is
// no memory for larger ones, such messages go on through host memory.
//
// Message u through a slot's payload, counted from 1 by both hosts:
//
//   producer   1 takes a free slot              host, so that the release of the slot has been enqueued
//              2 waits for what C computed      send stream, by an event
//              3 waits for released >= u-1      send stream
//              4 copies; 5 writes written = u   send stream, in this order
//              6 notes where it stands          an event; the source is kept until it has passed
//              7 writes the header, pushes      host, after all of this was enqueued
//   consumer   1 takes it, checks the header    host
//              2 waits for written >= u         compute stream
//              3 lends the slot                 until the tensor's storage is gone
//              4 writes released = u            compute stream; then the host gives the slot back
//
// A stream waits only for what its peer's host has enqueued before: the order of the queues sees to that. So of all
// unfinished operations, taken in the order of enqueuing, the first never waits for a later one, and since hardware
// queues are first in, first out, nothing is ever stuck, with one queue as with many.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <vector>

#include "device/memory.hpp"
#include "device/rank.hpp"
#include "host/lender.hpp"
#include "host/mailbox.hpp"

namespace pipex::device {

/// What the consumer offers in the ring: payloads of so many bytes.
struct PayloadOffer {
  std::atomic<std::uint32_t> generation;  // from 1; 0: none yet
  std::atomic<std::uint32_t> taken;       // the generation that the producer has mapped
  std::uint64_t bytes;
  MemoryOffer memory;
};
static_assert(sizeof(PayloadOffer) <= RingLayout::kOfferBytes);

/// The producer's end.
class RingSender {
 public:
  /// Throws NamedError: OutOfDeviceMemory, NativeUnavailable, CudaError.
  RingSender(std::shared_ptr<Rank> rank, int peer, const RingSize& size, const MessageHeader& edge);
  ~RingSender() { close(); }
  RingSender(const RingSender&) = delete;
  RingSender& operator=(const RingSender&) = delete;

  const MemoryOffer& offer() const { return memory_->offer(); }

  /// Opens the consumer's ring. Throws NamedError: InputError, NativeUnavailable.
  void connect(const Address& address, const MemoryOffer& written);

  /// Whether a message of so many bytes goes from device to device now; else its tensors must be sent from host memory.
  /// Throws NamedError where what the consumer has offered since cannot be mapped: NativeUnavailable, MessageMismatch.
  /// Throws InputError while a graph is captured from `compute`, Aborted.
  bool fits(std::size_t payload_bytes, StreamHandle compute);

  /// Enqueues copies behind what `compute` holds now. The sources must stay until Rank::sent() counts the message.
  /// Waits only if more than the planned messages are under way. Throws NamedError (InputError, CudaError), Aborted.
  void send(const MessageForm& form, const std::vector<std::uintptr_t>& tensors, StreamHandle compute,
            std::uint64_t step, std::uint32_t microbatch);

  /// The same from host memory, copied when it returns.
  void send_from_host(const MessageForm& form, const std::vector<std::uintptr_t>& tensors, std::uint64_t step,
                      std::uint32_t microbatch);

  /// See Outbox.
  void close_descriptors() { outbox_->close_descriptors(); }

  std::uint64_t grown() const { return payloads_.empty() ? 0 : payloads_.size() - 1; }
  std::size_t bytes() const { return mapped_bytes_ + (outbox_ ? outbox_->bytes() : 0); }

  /// Waits until the send stream is done, and lets go of the peer's memory. Safe to repeat.
  void close() noexcept;

 private:
  const std::shared_ptr<Rank> rank_;
  const int peer_;
  const RingSize size_;
  const MessageHeader edge_;
  std::shared_ptr<OwnMemory> memory_;  // released flags
  std::optional<Rescue::Ticket> watched_;
  std::optional<Outbox> outbox_;
  std::unique_ptr<PeerMemory> written_;
  std::vector<std::unique_ptr<PeerMemory>> payloads_;  // by generation
  std::size_t payload_bytes_ = 0;                      // of each in the newest
  std::size_t mapped_bytes_ = 0;                       // of all
  std::vector<std::uint64_t> uses_;                    // by slot
};

/// Payloads on the device.
class DeviceLender final : public Lender {
 public:
  DeviceLender(std::shared_ptr<Rank> rank, const RingSize& size);

  const std::shared_ptr<OwnMemory>& written() const { return written_; }
  void connect(const MemoryOffer& released, int peer);

  /// Makes payloads for messages of so many bytes, and offers them, unless the producer has yet to take the last offer
  /// or they were refused. Throws NamedError: OutOfDeviceMemory, NativeUnavailable, CudaError.
  void grow(std::size_t bytes);

  /// From here on messages of so many bytes and less make nothing grow.
  void refuse(std::size_t bytes) { refused_ = std::max(refused_, bytes); }

  /// Throws MessageMismatch if the payload of a slot's message cannot be there.
  void check_place(std::uint8_t place, const MessageForm& form) const;

  /// Lets `stream` wait for a slot's next message. Throws NamedError (MessageMismatch, CudaError).
  void await(std::uint32_t slot, StreamHandle stream, int peer);

  /// Makes a slot that was awaited the tensors of its message. Throws NamedError (MessageMismatch).
  Received lend_payload(std::uint32_t slot, std::uint8_t place, const MessageForm& form);

  /// Copies the tensors of a slot that was awaited to where the caller wants them, and gives it back.
  void copy_out(std::uint32_t slot, std::uint8_t place, const MessageForm& form, const std::vector<std::uintptr_t>& to);

  /// Throws what went wrong when a slot was given back, where nothing can be thrown.
  void raise_failure();

  /// From here on slots do not come back. Returns all memory that peers may have mapped.
  std::vector<std::shared_ptr<OwnMemory>> close() noexcept;

 protected:
  bool release(std::uint32_t slot) noexcept override;

 private:
  struct Use {
    std::uint64_t messages = 0;
    StreamHandle stream = nullptr;  // on which the latest was received; null: given back already
  };
  struct Payloads {
    std::size_t bytes;
    std::shared_ptr<OwnMemory> memory;
  };

  Payloads make(std::size_t bytes) const;
  PayloadOffer& offer() { return *reinterpret_cast<PayloadOffer*>(ring_.data() + layout_.offer()); }

  const std::shared_ptr<Rank> rank_;
  const std::uint32_t slots_;
  const std::shared_ptr<OwnMemory> written_;  // flags
  std::vector<Payloads> payloads_;            // by generation
  std::size_t refused_ = 0;                   // bytes for which there was no memory
  std::unique_ptr<PeerMemory> released_;      // null: not connected yet, or closed
  std::vector<Use> uses_;                     // by slot
  std::vector<bool> on_device_;               // by slot: whether it was awaited, so that a flag gives it back
  std::exception_ptr failure_;
};

/// The consumer's end; makes the memory of the payloads.
class RingReceiver {
 public:
  /// `size.alive`: how many messages may lie in slots at once. Throws NamedError: OutOfSharedMemory, OutOfDeviceMemory,
  /// NativeUnavailable, CudaError.
  RingReceiver(std::shared_ptr<Rank> rank, int peer, const RingSize& size, const MessageHeader& edge);
  ~RingReceiver() { close(); }
  RingReceiver(const RingReceiver&) = delete;
  RingReceiver& operator=(const RingReceiver&) = delete;

  Address address() const { return lender_->ring().address(); }
  const MemoryOffer& offer() const { return lender_->written()->offer(); }
  void close_descriptor() { lender_->ring().close_descriptor(); }

  /// Takes the producer's flags. Throws NamedError (NativeUnavailable).
  void connect(const MemoryOffer& released) { lender_->connect(released, peer_); }

  /// Waits on the host for the next message and checks its header; `compute` waits for its payload. The tensors are in
  /// host memory where the message came through it. Empty, and nothing done, if `alive` messages lie in slots already:
  /// then receive_into() must be called. `form` gets the form where it is another than before. Where the message came
  /// through host memory and `may_grow`, device memory is made for the next ones; without, for none as small again.
  /// Throws HeaderMismatch, NamedError (MessageMismatch, InputError, CudaError; OutOfDeviceMemory, only if `may_grow`,
  /// and the message stays where it is), Aborted.
  Received receive(StreamHandle compute, std::uint64_t step, std::uint32_t microbatch, bool may_grow,
                   const MessageForm*& form);

  /// The same, into memory of the caller's. Throws as receive().
  void receive_into(const std::vector<std::uintptr_t>& to, StreamHandle compute, std::uint64_t step,
                    std::uint32_t microbatch);

  std::uint32_t lent() { return lender_->lent(); }

  /// Waits until the compute streams are done, and lets go of the peer's memory. Safe to repeat.
  void close() noexcept;

 private:
  std::uint32_t front(StreamHandle compute, std::uint64_t step, std::uint32_t microbatch);
  void pop();

  const std::shared_ptr<Rank> rank_;
  const int peer_;
  const std::shared_ptr<DeviceLender> lender_;
  std::optional<Rescue::Ticket> watched_;
  Inbox inbox_;
};

}  // namespace pipex::device
