#include "host/segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "common/named_error.hpp"
#include "host/memory.hpp"

namespace pipex {
namespace {

constexpr std::uint64_t kMagic = 0x31676573'78657069;  // "ipexseg1"
constexpr const char* kOpening = "shared memory of another rank cannot be opened";
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

struct Header {
  std::uint64_t magic;
  std::array<std::uint8_t, 16> nonce;
};
static_assert(sizeof(Header) <= Segment::kHeaderBytes);

NamedError out_of_memory(std::size_t bytes, const std::string& got) {
  return {"OutOfSharedMemory", "shared memory between ranks cannot be allocated", got, std::to_string(bytes) + " bytes",
          "use smaller micro-batches or a plan with fewer slots, or free memory"};
}

NamedError not_a_segment(const std::string& got) {
  return {"InputError", "this is not shared memory of a running pipex process", got, "a sealed segment",
          "start all ranks of one host from one launcher, with one version of pipex and one view of /proc"};
}

}  // namespace

Segment::Segment(Descriptor fd, std::size_t mapped) : fd_(std::move(fd)), mapped_(mapped) {
  // Populated now: a first touch in the middle of a step costs several times the copy.
  void* base = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_.get(), 0);
  if (base == MAP_FAILED) throw out_of_memory(mapped, std::strerror(errno));
  base_ = static_cast<std::byte*>(base);
}

Segment::Segment(Segment&& other) noexcept
    : fd_(std::move(other.fd_)), mapped_(std::exchange(other.mapped_, 0)), base_(std::exchange(other.base_, nullptr)) {}

Segment::~Segment() {
  if (base_ != nullptr) ::munmap(base_, mapped_);
}

Segment Segment::create(std::size_t bytes) {
  // The kernel would rather kill a process than refuse pages of a memfd, so it is asked first.
  const std::uint64_t available = available_memory();
  if (bytes > available) throw out_of_memory(bytes, std::to_string(available) + " bytes available");
  const std::size_t mapped = kHeaderBytes + bytes;
  Descriptor fd(::memfd_create("pipex", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) throw system_failure("shared memory between ranks cannot be made", errno);
  int failed = ::fchmod(fd.get(), S_IRUSR | S_IWUSR);
  do {
    failed = failed != 0 ? failed : ::fallocate(fd.get(), 0, 0, static_cast<off_t>(mapped));
  } while (failed != 0 && errno == EINTR);
  if (failed != 0 || ::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) throw out_of_memory(bytes, std::strerror(errno));
  Segment segment(std::move(fd), mapped);
  auto* header = reinterpret_cast<Header*>(segment.base_);
  header->magic = kMagic;
  if (::getrandom(header->nonce.data(), header->nonce.size(), 0) != static_cast<ssize_t>(header->nonce.size()))
    throw out_of_memory(bytes, "no random bytes for its nonce");
  return segment;
}

Segment Segment::attach(int inherited) {
  Descriptor fd(inherited);
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) throw not_a_segment("a closed descriptor");
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals) throw not_a_segment("a file that is not sealed");
  if (status.st_size <= static_cast<off_t>(kHeaderBytes)) throw not_a_segment("an empty segment");
  ::fcntl(fd.get(), F_SETFD, FD_CLOEXEC);
  Segment segment(std::move(fd), static_cast<std::size_t>(status.st_size));
  if (reinterpret_cast<const Header*>(segment.base_)->magic != kMagic) throw not_a_segment("another program's memory");
  return segment;
}

Segment Segment::open(const Address& address) {
  const std::string path = "/proc/" + std::to_string(address.pid) + "/fd/" + std::to_string(address.fd);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0 && (errno == EMFILE || errno == ENFILE)) throw system_failure(kOpening, errno);
  if (fd < 0) throw not_a_segment(std::string("an address that cannot be opened: ") + std::strerror(errno));
  Segment segment = attach(fd);
  // Looked at after opening: whoever holds the id now held it when the file was opened, or the nonce differs.
  const std::optional<std::uint64_t> start = start_time(address.pid);
  if (!start) throw system_failure(kOpening, errno);
  if (start != address.start) throw not_a_segment("the address of a process that has ended");
  if (reinterpret_cast<const Header*>(segment.base_)->nonce != address.nonce) throw not_a_segment("another segment");
  return segment;
}

std::byte* Segment::data() const { return base_ + kHeaderBytes; }

std::size_t Segment::size() const { return mapped_ - kHeaderBytes; }

Address Segment::address() const {
  return {::getpid(), fd_.get(), own_start_time(), reinterpret_cast<const Header*>(base_)->nonce};
}

}  // namespace pipex
