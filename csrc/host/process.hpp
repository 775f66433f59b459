// Who a process is: a process id alone may be used again by another process, id and start time together may not.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace pipex {

/// Start time of a running process in clock ticks since boot (proc(5), field 22 of stat); 0 if it is gone or a zombie.
std::uint64_t start_time(pid_t pid);

/// Nanoseconds on a clock that all processes of one host share and that never jumps.
std::int64_t now_ns();

/// How many forks lie between the first process that asked and this one. A forked child inherits objects (by Python's
/// garbage collector it may even destroy them) whose threads and shared memory belong to its parent.
int fork_generation();

/// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    reset(other.release());
    return *this;
  }
  ~Descriptor() { reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  void reset(int fd = -1);

 private:
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }

  int fd_;
};

}  // namespace pipex
