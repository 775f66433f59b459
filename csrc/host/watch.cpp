#include "host/watch.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <optional>
#include <utility>

namespace pipex {
namespace {

constexpr int kBeatMs = 100;
constexpr int kMeetMs = 10;  // while some peer has not joined yet

}  // namespace

Watch::Watch(std::shared_ptr<Control> control, int rank)
    : control_(std::move(control)), rank_(rank), generation_(fork_generation()), stop_(::eventfd(0, EFD_CLOEXEC)) {
  if (!stop_.valid()) throw system_failure("the watch over the other ranks cannot begin", errno);
  for (int peer = 0; peer < control_->ranks(); ++peer)
    if (peer != rank) peers_.push_back(Peer{peer, Descriptor()});
  // Signals are for the interpreter's threads: a wait there must be interrupted by Ctrl-C.
  sigset_t all, before;
  sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread(&Watch::run, this);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Watch::~Watch() {
  if (fork_generation() != generation_) {
    thread_.detach();
    return;
  }
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(stop_.get(), &one, sizeof one);
  thread_.join();
}

void Watch::run() {
  std::vector<pollfd> polled(1 + peers_.size());
  polled[0] = {stop_.get(), POLLIN, 0};
  while (polled[0].revents == 0) {
    control_->part(rank_).heartbeat.store(now_ns());
    bool all_known = true;
    for (std::size_t i = 0; i < peers_.size(); ++i) {
      if (!peers_[i].known) meet(peers_[i]);
      all_known = all_known && peers_[i].known;
      polled[1 + i] = {peers_[i].gone ? -1 : peers_[i].pidfd.get(), POLLIN, 0};  // -1 is skipped
    }
    ::poll(polled.data(), polled.size(), all_known ? kBeatMs : kMeetMs);
    for (std::size_t i = 0; i < peers_.size(); ++i) check(peers_[i], polled[1 + i].revents != 0);
  }
}

void Watch::meet(Peer& peer) {
  const RankPart& part = control_->part(peer.rank);
  if (part.presence.load() == Presence::absent) return;
  peer.known = true;
  peer.pidfd.reset(static_cast<int>(::syscall(SYS_pidfd_open, part.pid.load(), 0)));
}

void Watch::check(Peer& peer, bool died) {
  if (!peer.known || peer.gone) return;
  const RankPart& part = control_->part(peer.rank);
  // Without a pidfd (old kernel, sandbox, no descriptor left) the process table is read on every beat instead.
  if (!died && !peer.pidfd.valid()) {
    const std::optional<std::uint64_t> start = start_time(part.pid.load());
    died = start && *start != part.start.load();
  }
  if (!died) return;
  peer.gone = true;
  if (part.presence.load() != Presence::left)
    control_->record(rank_, Ending::lost, peer.rank, "is gone: its process has ended");
}

}  // namespace pipex
