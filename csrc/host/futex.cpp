#include "host/futex.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace pipex {

// Not FUTEX_PRIVATE: sleeper and waker live in different processes. Early returns (EINTR, EAGAIN) are fine, callers
// loop.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t value) {
  const timespec slice{0, std::chrono::nanoseconds(kSlice).count()};
  ::syscall(SYS_futex, &word, FUTEX_WAIT, value, &slice, nullptr, 0);
}

void futex_wake_all(std::atomic<std::uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace pipex
