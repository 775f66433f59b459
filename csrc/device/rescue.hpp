// Frees this process's streams when the run has ended, and ends the run when they are stuck.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "device/context.hpp"
#include "device/trail.hpp"
#include "host/member.hpp"

namespace pipex::device {

/// The value that satisfies every wait: more messages than any run has, and still in front of them on the circle that
/// a wait compares on.
constexpr std::uint64_t kReleaseAll = std::uint64_t{1} << 62;

/// One thread that never takes Python's lock: the main thread may be inside a call of the driver that only ends when
/// the stream moves on. It writes `kReleaseAll` into this process's own flags, on which alone its streams wait, and
/// does so again and again: a peer that still works may have written a smaller number over it.
///
/// It also is the patience of a host whose GPU waits: a stream that stands at a message while the rank at the end of
/// the chain of waits makes no progress ends the run as "stalled".
class Rescue {
 public:
  /// `receives` and `sends` are what the rank's streams wait for.
  Rescue(std::shared_ptr<const Gpu> gpu, std::shared_ptr<Member> member, Trail& receives, Trail& sends);
  ~Rescue();
  Rescue(const Rescue&) = delete;
  Rescue& operator=(const Rescue&) = delete;

  struct Flags {
    DevicePointer first;
    std::uint64_t stride;
    std::uint32_t count;
  };
  using Ticket = std::list<Flags>::iterator;

  /// Flags that some stream of this process may wait for.
  Ticket watch(const Flags& flags);
  void forget(Ticket ticket);

  const Stream& stream() const { return stream_; }

 private:
  void run();
  void release_all();
  void look();

  const std::shared_ptr<const Gpu> gpu_;
  const std::shared_ptr<Member> member_;
  Trail& receives_;
  Trail& sends_;
  const Stream stream_;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stop_ = false;
  std::list<Flags> flags_;

  std::optional<Trail::Oldest> awaited_;
  std::optional<Patience> patience_;  // for it
  std::thread thread_;
};

}  // namespace pipex::device
