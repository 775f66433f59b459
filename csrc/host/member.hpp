// This process as a rank of a run: it is watched, it says what it does, and all its waiting goes through here.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "host/control.hpp"
#include "host/futex.hpp"
#include "host/process.hpp"
#include "host/watch.hpp"

namespace pipex {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Lets somebody wait only while the rank at the end of the chain of waits moves on within the limit.
class Patience {
 public:
  Patience(Control& control, int self, int peer, std::chrono::nanoseconds limit);

  /// Writes the abort record "stalled" once the limit has passed without progress.
  void check();

 private:
  std::string reason(const Culprit& culprit) const;

  Control& control_;
  const int self_, peer_;
  const std::chrono::nanoseconds limit_;
  int culprit_;
  Progress progress_;
  std::uint64_t device_progress_;
  std::int64_t since_;
};

constexpr int kNobody = -1;  // a wait for something of this process itself, however long it takes

class Member {
 public:
  /// `spin`: there is a core for every rank's thread, so that a short wait need not sleep.
  /// `between_slices` is called about every 20 ms of a wait and may throw to leave it.
  Member(std::shared_ptr<Control> control, int rank, std::chrono::nanoseconds timeout, bool spin,
         void (*between_slices)());

  int rank() const { return rank_; }
  Control& control() const { return *control_; }
  std::chrono::nanoseconds timeout() const { return timeout_; }

  /// Publishes what this rank does next.
  void at(Progress progress) { part_.progress.store(progress, std::memory_order_release); }

  /// All-gather of byte strings in rank order. Throws Aborted, or MessageMismatch for sizes that cannot be.
  std::vector<std::string> exchange(std::string_view payload);

  /// For what a peer should have and has not. Throws Aborted if that is because the run has ended or the peer has died;
  /// others see a death a moment after the kernel has closed the process's descriptors.
  void raise_if_ending();

  /// Leaves the run: from now on the end of this process is no failure. Safe to repeat.
  void leave();

  /// Returns once `ready` holds, which `peer` makes true before it rings `bell`. Throws Aborted.
  template <typename Ready>
  void wait(Doorbell& bell, int peer, Ready&& ready) {
    wait_sleeping(peer, ready, [&] { return bell.sleep(ready); });
  }

  /// The same where nobody rings: looks again every 50 µs. `peer` may be kNobody.
  template <typename Ready>
  void wait_polling(int peer, Ready&& ready) {
    wait_sleeping(peer, ready, [&] {
      for (const std::int64_t until = now_ns() + std::chrono::nanoseconds(kSlice).count(); now_ns() < until;) {
        if (ready()) return true;
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
      return ready();
    });
  }

 private:
  // Between two looks at the clock. More would keep other ranks from their work where cores are short: 2000 pauses cost
  // 54 µs in the median with 4 processes on 2 cores, 200 nothing measurable.
  static constexpr int kSpins = 200;
  // Where there is a core for every rank, a waiter spins about as long as an action of a small stage takes: going to
  // sleep and being woken costs the waker some 15 µs and the sleeper 40.
  static constexpr std::chrono::nanoseconds kSpinFor = std::chrono::milliseconds(1);

  struct Piece {
    std::string_view bytes;  // in shared memory, until this rank posts again
    std::uint64_t total;
  };

  /// `sleep` ends after a slice at most and says whether `ready` holds.
  template <typename Ready, typename Sleep>
  void wait_sleeping(int peer, Ready&& ready, Sleep&& sleep);

  void post(std::string_view bytes, std::uint64_t total);
  Piece await(int rank);

  const std::shared_ptr<Control> control_;
  const int rank_;
  RankPart& part_;
  const std::chrono::nanoseconds timeout_;
  const std::int64_t spin_ns_;
  void (*const between_slices_)();
  std::uint64_t rounds_ = 0;
  std::optional<Watch> watch_;
};

template <typename Ready, typename Sleep>
void Member::wait_sleeping(int peer, Ready&& ready, Sleep&& sleep) {
  const std::int64_t until = now_ns() + spin_ns_;
  do {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (ready()) return;
      pause_cpu();
    }
  } while (now_ns() < until);
  struct Waiting {
    Waiting(RankPart& part, int peer) : part(part) { part.waiting_on.store(peer + 1); }
    ~Waiting() { part.waiting_on.store(0); }
    RankPart& part;
  } waiting(part_, peer);
  std::optional<Patience> patience;
  if (peer != kNobody) patience.emplace(*control_, rank_, peer, timeout_);
  do {
    control_->raise_if_aborted();
    if (patience) patience->check();
    between_slices_();
  } while (!sleep());
}

}  // namespace pipex
