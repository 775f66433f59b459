// Memory that another process can map: a memfd, which it opens through /proc/PID/fd/N.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "simulator.hpp"

namespace simulated {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::uint64_t kMagic = 0x6461635f'6d6973ff;

struct Handle {
  std::uint64_t magic;
  std::int32_t pid, fd;
  std::uint64_t bytes;
};
static_assert(sizeof(Handle) <= sizeof(IpcHandle));

std::size_t mapped_bytes(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage + kPage; }

Result map(int fd, std::size_t bytes, Mapping* mapping) {
  void* base = ::mmap(nullptr, mapped_bytes(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return kMapFailed;
  mapping->range = {reinterpret_cast<std::uintptr_t>(base), bytes};
  return kSuccess;
}

}  // namespace

Result create_memory(Mapping* mapping) {
  const std::size_t bytes = mapping->range.bytes;
  mapping->fd = ::memfd_create("simulated_cuda", MFD_CLOEXEC);
  if (mapping->fd < 0 || ::ftruncate(mapping->fd, static_cast<off_t>(mapped_bytes(bytes))) != 0) return kOutOfMemory;
  return map(mapping->fd, bytes, mapping);
}

IpcHandle handle_of(const Mapping& mapping) {
  const Handle handle{kMagic, ::getpid(), mapping.fd, mapping.range.bytes};
  IpcHandle raw{};
  std::memcpy(&raw, &handle, sizeof handle);
  return raw;
}

Result open_memory(const IpcHandle& raw, Mapping* mapping) {
  Handle handle;
  std::memcpy(&handle, &raw, sizeof handle);
  if (handle.magic != kMagic) return kInvalidValue;
  const std::string path = "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.fd);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return kMapFailed;
  const Result result = map(fd, handle.bytes, mapping);
  ::close(fd);
  return result;
}

void close_memory(const Mapping& mapping) {
  ::munmap(reinterpret_cast<void*>(mapping.range.begin), mapped_bytes(mapping.range.bytes));
  if (mapping.own()) ::close(mapping.fd);
}

std::atomic<std::int32_t>& importers(const Mapping& mapping) {
  const std::uint64_t end = mapping.range.begin + mapped_bytes(mapping.range.bytes);
  return *reinterpret_cast<std::atomic<std::int32_t>*>(end - kPage);
}

}  // namespace simulated
