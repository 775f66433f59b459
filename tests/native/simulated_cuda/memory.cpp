// Device memory, poisoned when new: who has mapped what, and host memory that the device sees.
#include <sys/mman.h>

#include <cstring>

#include "simulator.hpp"

namespace simulated {
namespace {

constexpr std::size_t kBlock = 2 << 20;  // smaller allocations of CUDA's share one, which a handle opens as a whole

Result unmap(DevicePointer pointer, bool own) {
  State& all = state();
  const std::lock_guard lock(all.mutex);
  const auto found = all.mappings.find(pointer);
  if (found == all.mappings.end() || found->second.own() != own) return kInvalidValue;
  const Mapping mapping = found->second;
  for (const auto& queue : all.queues)
    if (queue->touches(mapping.range))
      violate(own ? "freed while operations use it" : "unmapped while operations use it");
  if (own && importers(mapping) > 0) violate("freed while a peer has it mapped");
  if (!own) --importers(mapping);
  close_memory(mapping);
  all.mappings.erase(found);
  return kSuccess;
}

}  // namespace

const Mapping* mapping_of(const Range& range) {
  const auto& mappings = state().mappings;
  auto found = mappings.upper_bound(range.begin);
  if (found == mappings.begin()) return nullptr;
  --found;
  const Range& whole = found->second.range;
  return range.begin + range.bytes <= whole.begin + whole.bytes ? &found->second : nullptr;
}

}  // namespace simulated

using namespace simulated;

SIMULATED Result cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  *free = state().settings.memory;
  *total = std::size_t{2} << 30;
  return enter("cuMemGetInfo_v2");
}

SIMULATED Result cuMemAlloc_v2(DevicePointer* pointer, std::size_t bytes) {
  if (const Result result = enter("cuMemAlloc_v2")) return result;
  if (bytes == 0) return kInvalidValue;
  if (bytes > state().settings.memory) return kOutOfMemory;
  Mapping mapping{{0, bytes}};
  if (const Result result = create_memory(&mapping)) return result;
  *pointer = mapping.range.begin;
  std::memset(reinterpret_cast<void*>(*pointer), 0xA5, bytes);
  const std::lock_guard lock(state().mutex);
  state().mappings[*pointer] = mapping;
  return kSuccess;
}

SIMULATED Result cuMemFree_v2(DevicePointer pointer) {
  if (const Result result = enter("cuMemFree_v2")) return result;
  return unmap(pointer, true);
}

SIMULATED Result cuMemHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  if (const Result result = enter("cuMemHostAlloc")) return result;
  *pointer = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  const std::lock_guard lock(state().mutex);
  const auto begin = reinterpret_cast<std::uintptr_t>(*pointer);
  state().host_memory[*pointer] = bytes;
  state().mappings[begin] = {{begin, bytes}};
  return kSuccess;
}

SIMULATED Result cuMemFreeHost(void* pointer) {
  if (const Result result = enter("cuMemFreeHost")) return result;
  const std::lock_guard lock(state().mutex);
  const auto found = state().host_memory.find(pointer);
  if (found == state().host_memory.end()) return kInvalidValue;
  ::munmap(pointer, found->second);
  state().mappings.erase(reinterpret_cast<std::uintptr_t>(pointer));
  state().host_memory.erase(found);
  return kSuccess;
}

SIMULATED Result cuPointerGetAttribute(void* value, PointerAttribute attribute, DevicePointer pointer) {
  if (const Result result = enter("cuPointerGetAttribute")) return result;
  const std::lock_guard lock(state().mutex);
  if (attribute != kLegacyIpcCapable || mapping_of({pointer, 1}) == nullptr) return kInvalidValue;
  const int capable = 1;
  std::memcpy(value, &capable, sizeof capable);
  return kSuccess;
}

SIMULATED Result cuIpcGetMemHandle(IpcHandle* raw, DevicePointer pointer) {
  if (const Result result = enter("cuIpcGetMemHandle")) return result;
  const std::lock_guard lock(state().mutex);
  const auto found = state().mappings.find(pointer);
  if (found == state().mappings.end() || !found->second.own()) return kInvalidValue;
  if (found->second.range.bytes % kBlock != 0) violate("exported memory that may share its block with other memory");
  *raw = handle_of(found->second);
  return kSuccess;
}

SIMULATED Result cuIpcOpenMemHandle_v2(DevicePointer* pointer, IpcHandle raw, unsigned flags) {
  if (const Result result = enter("cuIpcOpenMemHandle_v2")) return result;
  Mapping mapping;
  if (flags != kLazyPeerAccess) return kInvalidValue;
  if (const Result result = open_memory(raw, &mapping)) return result;
  *pointer = mapping.range.begin;
  const std::lock_guard lock(state().mutex);
  ++importers(mapping);
  state().mappings[*pointer] = mapping;
  return kSuccess;
}

SIMULATED Result cuIpcCloseMemHandle(DevicePointer pointer) {
  if (const Result result = enter("cuIpcCloseMemHandle")) return result;
  return unmap(pointer, false);
}
