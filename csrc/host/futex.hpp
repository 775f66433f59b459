// Sleeping until another process has written a shared word.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace pipex {

/// Longest sleep between two looks at the abort record and the clock; so nobody waits longer for bad news.
constexpr std::chrono::milliseconds kSlice{20};

/// futex(2) on a word in shared memory: sleeps while `word` holds `value`, at most one slice.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t value);
void futex_wake_all(std::atomic<std::uint32_t>& word);

/// Wakes those who sleep until some condition holds; lies in shared memory, all zero at first.
///
/// Nobody is missed (Dekker): the writer stores its data, then loads the flag; the sleeper stores the flag, then loads
/// the data. All four must be seq_cst, else both may read the old value. A crashed writer costs one slice at most.
class Doorbell {
 public:
  /// Call after the seq_cst store that makes the condition true.
  void ring() {
    if (sleeping_.load() == 0) return;
    sleeping_.store(0);
    futex_wake_all(sleeping_);
  }

  /// Sleeps at most one slice; says whether `ready` (which reads with seq_cst) holds.
  template <typename Ready>
  bool sleep(Ready&& ready) {
    sleeping_.store(1);
    if (ready()) return true;
    futex_wait(sleeping_, 1);
    return ready();
  }

 private:
  std::atomic<std::uint32_t> sleeping_;
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

}  // namespace pipex
