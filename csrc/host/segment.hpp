// Shared memory without a name: nothing to guess, nothing left behind after SIGKILL.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "host/process.hpp"

namespace pipex {

/// Where another process of this host finds a segment, and how it knows that it found the right one.
struct Address {
  std::int32_t pid;
  std::int32_t fd;
  std::uint64_t start;  // start time of `pid`
  std::array<std::uint8_t, 16> nonce;
};
static_assert(sizeof(Address) == 32, "an address crosses processes as 32 bytes");

/// A mapped memfd, sealed against any change of size: no peer can turn an access into SIGBUS.
class Segment {
 public:
  /// Before data(), which it keeps aligned to two cache lines.
  static constexpr std::size_t kHeaderBytes = 128;

  /// Makes a segment with `bytes` of zeroed, really allocated memory. Throws OutOfSharedMemory, or InputError where
  /// this process has no file descriptor left.
  static Segment create(std::size_t bytes);

  /// Maps the segment behind an inherited descriptor, which it takes over. Throws InputError.
  static Segment attach(int fd);

  /// Maps a running peer's segment through /proc/PID/fd/N. Throws InputError.
  static Segment open(const Address& address);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&&) = delete;
  ~Segment();

  /// The user's bytes, aligned to 128; memory is shared, so only its size can be trusted.
  std::byte* data() const;
  std::size_t size() const;

  /// Valid in this process until close_descriptor().
  Address address() const;
  int fd() const { return fd_.get(); }

  /// After this nobody else can open the segment; the mapping stays.
  void close_descriptor() { fd_.reset(); }

 private:
  Segment(Descriptor fd, std::size_t mapped);

  Descriptor fd_;
  std::size_t mapped_;
  std::byte* base_;
};

}  // namespace pipex
