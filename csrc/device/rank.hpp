// What all device rings of a rank share.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device/context.hpp"
#include "device/memory.hpp"
#include "device/rescue.hpp"
#include "device/trail.hpp"
#include "host/dlpack.hpp"
#include "host/member.hpp"

namespace pipex::device {

/// This process as a rank with a GPU. All rings send on one stream, in the order of their sends.
class Rank {
 public:
  /// `device` is where torch sees the GPU's memory. Throws NamedError: NativeUnavailable, CudaError.
  Rank(std::shared_ptr<Member> member, const std::string& library, int ordinal, dlpack::Device device);
  ~Rank();
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;

  const std::shared_ptr<const Gpu>& gpu() const { return gpu_; }
  const Driver& driver() const { return gpu_->driver(); }
  Member& member() const { return *member_; }
  const std::shared_ptr<Member>& shared_member() const { return member_; }
  dlpack::Device device() const { return device_; }
  const Stream& send_stream() const { return send_stream_; }

  /// For what the host waits for: nothing on it waits for a peer. Until close().
  const Stream& ready_stream() const { return rescue_->stream(); }
  Trail& receives() { return receives_; }
  Trail& sends() { return sends_; }

  /// What this GPU lacks for device rings, in words; empty where nothing. Takes up to a second where it is not empty.
  std::string missing();

  /// Throws InputError if a graph is being captured from `stream`: counters would be constants in it.
  void check_not_capturing(StreamHandle stream) const;

  /// How many messages have been copied from their sources, in the order of the sends.
  std::uint64_t sent();

  /// Waits until all have, which also means that all of them have arrived. Throws Aborted.
  void flush();

  /// Waits until all that is enqueued on a stream is done; false if it stays stuck though the run has ended. All calls
  /// together wait 2 s after that.
  bool drain(StreamHandle stream) noexcept;

  Rescue::Ticket watch(const OwnMemory& memory, std::uint32_t slots);
  void forget(Rescue::Ticket ticket);

  /// Keeps a closed ring's memory until free_retired(): peers may have it mapped.
  void retire(std::shared_ptr<OwnMemory> memory);

  /// Call once all peers have closed the rings that this rank has closed.
  void free_retired();

  /// Ends the rescue thread. All rings must be closed.
  void close();

 private:
  std::string self_test();

  const std::shared_ptr<Member> member_;
  const std::shared_ptr<const Gpu> gpu_;
  const dlpack::Device device_;
  const Stream send_stream_;
  Trail receives_, sends_;
  std::optional<Rescue> rescue_;
  std::optional<std::chrono::steady_clock::time_point> draining_since_;  // in an ended run

  std::mutex retiring_;
  std::vector<std::shared_ptr<OwnMemory>> retired_;
};

}  // namespace pipex::device
