// Stands in for csrc/host/segment.cpp: both ends of a ring see one piece of ordinary memory. ThreadSanitizer takes two
// mappings of a memfd for different memory, and AddressSanitizer sees the bounds of what was allocated only.
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "common/named_error.hpp"
#include "host/segment.hpp"

namespace pipex {
namespace {

struct Shared {
  std::size_t bytes;
  int users;
};

std::mutex mutex;
std::map<std::byte*, Shared> pieces;  // by the address that their nonce holds

}  // namespace

Segment::Segment(Descriptor fd, std::size_t mapped) : fd_(std::move(fd)), mapped_(mapped), base_(nullptr) {}

Segment::Segment(Segment&& other) noexcept
    : fd_(std::move(other.fd_)), mapped_(other.mapped_), base_(std::exchange(other.base_, nullptr)) {}

Segment::~Segment() {
  if (base_ == nullptr) return;
  const std::lock_guard<std::mutex> lock(mutex);
  if (--pieces.at(base_).users > 0) return;
  pieces.erase(base_);
  std::free(base_);
}

Segment Segment::create(std::size_t bytes) {
  void* memory = nullptr;
  if (::posix_memalign(&memory, 128, bytes) != 0) throw std::bad_alloc();
  Segment segment(Descriptor(), bytes);
  segment.base_ = static_cast<std::byte*>(std::memset(memory, 0, bytes));
  const std::lock_guard<std::mutex> lock(mutex);
  pieces[segment.base_] = {bytes, 1};
  return segment;
}

Segment Segment::open(const Address& address) {
  std::byte* base;
  std::memcpy(&base, address.nonce.data(), sizeof base);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto piece = pieces.find(base);
  if (piece == pieces.end()) throw NamedError("InputError", "no shared memory", "", "", "");
  ++piece->second.users;
  Segment segment(Descriptor(), piece->second.bytes);
  segment.base_ = base;
  return segment;
}

Segment Segment::attach(int) { std::abort(); }  // nothing here is inherited

std::byte* Segment::data() const { return base_; }

std::size_t Segment::size() const { return mapped_; }

Address Segment::address() const {
  Address address{::getpid(), -1, 0, {}};
  std::memcpy(address.nonce.data(), &base_, sizeof base_);
  return address;
}

}  // namespace pipex
