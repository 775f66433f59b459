// Who a process is: a process id alone may be used again by another process, id and start time together may not.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>

#include "common/named_error.hpp"

namespace pipex {

/// Start time of a running process in clock ticks since boot (proc(5), field 22 of stat); 0 if it is gone or a zombie.
/// Nothing where that cannot be told, as by a process that has no file descriptor left: no sign that anything has
/// ended.
std::optional<std::uint64_t> start_time(pid_t pid);

/// That of this process, which is read once; throws where it cannot be told.
std::uint64_t own_start_time();

/// The error where `error` (an errno) left `problem` undone; where this process or the host has no descriptor left, it
/// says so.
NamedError system_failure(const std::string& problem, int error);

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
