// One tensor of one edge, between two processes of one host that have a GPU each (or share one).
//
//   consumer's device   a payload per slot, written[slot]      the producer's send stream writes both
//   producer's device   released[slot]                         the consumer's compute stream writes it
//   host                ready and free queue, headers          as for tensors in host memory (host/mailbox.hpp)
//
// Message u of a slot, counted from 1 by both hosts:
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

/// The producer's end.
class RingSender {
 public:
  /// Throws NamedError: OutOfDeviceMemory, NativeUnavailable, CudaError.
  RingSender(std::shared_ptr<Rank> rank, int peer, const RingSize& size);
  ~RingSender() { close(); }
  RingSender(const RingSender&) = delete;
  RingSender& operator=(const RingSender&) = delete;

  const MemoryOffer& offer() const { return memory_->offer(); }

  /// Opens the consumer's ring. Throws NamedError: InputError, NativeUnavailable.
  void connect(const Address& address, const MemoryOffer& slots);

  /// Enqueues a copy behind what `compute` holds now. The source must stay until Rank::sent() counts it. Waits only if
  /// more than the planned messages are under way. Throws NamedError (InputError, CudaError), Aborted.
  void send(const TensorTemplate& tensor, DevicePointer source, StreamHandle compute, std::uint64_t step,
            std::uint32_t microbatch);

  /// Waits until the send stream is done, and lets go of the peer's memory. Safe to repeat.
  void close() noexcept;

 private:
  const std::shared_ptr<Rank> rank_;
  const int peer_;
  const RingSize size_;
  std::shared_ptr<OwnMemory> memory_;  // released flags
  std::optional<Rescue::Ticket> watched_;
  std::optional<Outbox> outbox_;
  std::unique_ptr<PeerMemory> slots_;
  std::vector<std::uint64_t> uses_;  // by slot
};

/// Payloads on the device.
class DeviceLender final : public Lender {
 public:
  DeviceLender(std::shared_ptr<Rank> rank, const RingSize& size);

  const std::shared_ptr<OwnMemory>& memory() const { return memory_; }
  void connect(const MemoryOffer& released, int peer);

  /// Lets `stream` wait for a slot's next message. Throws NamedError (MessageMismatch, CudaError).
  void await(std::uint32_t slot, StreamHandle stream, int peer);

  /// Copies a slot that was awaited to where the caller wants it, and gives it back.
  void copy_out(std::uint32_t slot, const TensorTemplate& tensor, DevicePointer to);

  /// Throws what went wrong when a slot was given back, where nothing can be thrown.
  void raise_failure();

  /// From here on slots do not come back.
  void close() noexcept;

 protected:
  std::byte* payload(std::uint32_t slot) const override;
  bool release(std::uint32_t slot) noexcept override;

 private:
  struct Use {
    std::uint64_t messages = 0;
    StreamHandle stream = nullptr;  // on which the latest was received
  };

  const std::shared_ptr<Rank> rank_;
  const RingSize size_;
  const std::shared_ptr<OwnMemory> memory_;  // payloads and written flags
  std::unique_ptr<PeerMemory> released_;     // null: not connected yet, or closed
  std::vector<Use> uses_;                    // by slot
  std::exception_ptr failure_;
};

/// The consumer's end; makes the memory of the payloads.
class RingReceiver {
 public:
  /// `size.alive`: how many tensors may lie in slots at once. Throws NamedError: OutOfSharedMemory, OutOfDeviceMemory,
  /// NativeUnavailable, CudaError.
  RingReceiver(std::shared_ptr<Rank> rank, int peer, const RingSize& size);
  ~RingReceiver() { close(); }
  RingReceiver(const RingReceiver&) = delete;
  RingReceiver& operator=(const RingReceiver&) = delete;

  Address address() const { return lender_->segment().address(); }
  const MemoryOffer& offer() const { return lender_->memory()->offer(); }
  void close_descriptor() { lender_->segment().close_descriptor(); }

  /// Takes the producer's flags. Throws NamedError (NativeUnavailable).
  void connect(const MemoryOffer& released) { lender_->connect(released, peer_); }

  /// Waits on the host for the next message and checks its header; `compute` waits for its payload. Null, and nothing
  /// done, if `alive` tensors lie in slots already: then receive_into() must be called. Throws HeaderMismatch,
  /// NamedError (MessageMismatch, InputError, CudaError), Aborted.
  LoanPtr receive(const TensorTemplate& tensor, StreamHandle compute, std::uint64_t step, std::uint32_t microbatch);

  /// The same, into memory of the caller's.
  void receive_into(const TensorTemplate& tensor, DevicePointer to, StreamHandle compute, std::uint64_t step,
                    std::uint32_t microbatch);

  std::uint32_t lent() { return lender_->lent(); }

  /// Waits until the compute streams are done, and lets go of the peer's memory. Safe to repeat.
  void close() noexcept;

 private:
  std::uint32_t front(const TensorTemplate& tensor, StreamHandle compute, std::uint64_t step, std::uint32_t microbatch);
  void pop();

  const std::shared_ptr<Rank> rank_;
  const int peer_;
  const RingSize size_;
  const std::shared_ptr<DeviceLender> lender_;
  std::optional<Rescue::Ticket> watched_;
  Inbox inbox_;
};

}  // namespace pipex::device
