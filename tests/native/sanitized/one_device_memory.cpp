// Stands in for tests/native/simulated_cuda/exported.cpp: a peer in this process gets the very memory instead of
// another mapping of it, and the sanitizers see its bounds and its end (see one_mapping.cpp).
#include <cstdlib>
#include <cstring>
#include <new>

#include "simulator.hpp"

namespace simulated {
namespace {

constexpr std::size_t kAlignment = 512;  // what cuMemAlloc gives, or more; in front of the memory its count stands

struct Handle {
  std::uint64_t begin, bytes;
};

void* block_of(const Mapping& mapping) { return reinterpret_cast<std::byte*>(mapping.range.begin) - kAlignment; }

}  // namespace

Result create_memory(Mapping* mapping) {
  void* block = nullptr;
  if (::posix_memalign(&block, kAlignment, kAlignment + mapping->range.bytes) != 0) return kOutOfMemory;
  mapping->range.begin = reinterpret_cast<std::uintptr_t>(block) + kAlignment;
  mapping->fd = 0;
  new (block) std::atomic<std::int32_t>(0);
  return kSuccess;
}

IpcHandle handle_of(const Mapping& mapping) {
  const Handle handle{mapping.range.begin, mapping.range.bytes};
  IpcHandle raw{};
  std::memcpy(&raw, &handle, sizeof handle);
  return raw;
}

Result open_memory(const IpcHandle& raw, Mapping* mapping) {
  Handle handle;
  std::memcpy(&handle, &raw, sizeof handle);
  if (handle.begin == 0) return kMapFailed;
  mapping->range = {handle.begin, handle.bytes};
  return kSuccess;
}

void close_memory(const Mapping& mapping) {
  if (mapping.own()) std::free(block_of(mapping));
}

std::atomic<std::int32_t>& importers(const Mapping& mapping) {
  return *static_cast<std::atomic<std::int32_t>*>(block_of(mapping));
}

}  // namespace simulated
