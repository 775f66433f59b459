// Device memory that another process of this host maps: what a ring's two ends write at each other.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "device/context.hpp"
#include "host/control.hpp"

namespace pipex::device {

/// What lies in an allocation; both ends compute it from the number of slots and the bytes of a payload.
///
///     proof | one flag per slot | one payload per slot | up to 2 MiB of nothing
///
/// Proof and flags stand on lines of 128 bytes of their own: a flag is polled by the GPU that owns it while the peer
/// writes its neighbour.
struct MemoryLayout {
  std::size_t slot_bytes;  // 0 where there are flags only
  std::uint32_t slots;

  std::size_t flag(std::uint32_t slot) const;
  std::size_t payload(std::uint32_t slot) const;
  std::size_t total() const;
};

using Nonce = std::array<std::uint8_t, 16>;

/// What stands in the memory itself, so that a peer trusts no number that was written anywhere else.
struct MemoryProof {
  Nonce nonce;
  std::uint64_t slot_bytes, slots;
  bool operator==(const MemoryProof&) const = default;
};

/// How a peer finds an end's memory, and knows that what it has mapped is that memory.
struct MemoryOffer {
  IpcHandle handle;
  Nonce nonce;
};
static_assert(sizeof(MemoryOffer) == 80, "an offer crosses processes as 80 bytes");

/// An allocation of our own, exported. Not from torch's allocator: a handle opens the whole allocation that a pointer
/// lies in, and torch's may be of a kind that has no handle.
class OwnMemory {
 public:
  /// Flags are 0. Waits for `stream`. Throws NamedError: OutOfDeviceMemory; NativeUnavailable where the driver exports
  /// no memory.
  OwnMemory(std::shared_ptr<const Gpu> gpu, std::shared_ptr<const Control> control, const MemoryLayout& layout,
            const Stream& stream);

  /// Frees it; peers must have closed their mappings. After an abort nobody knows whether they have, so then the memory
  /// stays until the process ends.
  ~OwnMemory();
  OwnMemory(const OwnMemory&) = delete;
  OwnMemory& operator=(const OwnMemory&) = delete;

  const MemoryOffer& offer() const { return offer_; }
  DevicePointer flag(std::uint32_t slot) const { return base_ + layout_.flag(slot); }
  DevicePointer payload(std::uint32_t slot) const { return base_ + layout_.payload(slot); }

 private:
  void initialise(const Stream& stream);
  void export_to_peers();

  const std::shared_ptr<const Gpu> gpu_;
  const std::shared_ptr<const Control> control_;
  const MemoryLayout layout_;
  DevicePointer base_ = 0;
  MemoryOffer offer_{};
};

/// A peer's memory, mapped here. All of our operations on it must be done before it is closed.
class PeerMemory {
 public:
  /// `self` and `peer` are the ranks, for the error. Waits for `stream`. Throws NamedError (NativeUnavailable), also
  /// where the memory is of another layout.
  PeerMemory(std::shared_ptr<const Gpu> gpu, const MemoryOffer& offer, const MemoryLayout& layout, const Stream& stream,
             int self, int peer);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  DevicePointer flag(std::uint32_t slot) const { return base_ + layout_.flag(slot); }
  DevicePointer payload(std::uint32_t slot) const { return base_ + layout_.payload(slot); }

 private:
  const std::shared_ptr<const Gpu> gpu_;
  const MemoryLayout layout_;
  DevicePointer base_ = 0;
};

}  // namespace pipex::device
