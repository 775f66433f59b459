#include "device/memory.hpp"

#include <sys/random.h>

#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "common/named_error.hpp"

namespace pipex::device {
namespace {

constexpr std::size_t kLine = 128;
constexpr std::size_t kAlignment = 512;  // of a payload: what torch's own allocator gives
// The driver puts smaller allocations together, and a handle then opens all of them (CUDA C++ Programming Guide,
// "Interprocess Communication"): peers would see what is not theirs, and map one block twice.
constexpr std::size_t kOwnBlock = 2 << 20;

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

std::size_t MemoryLayout::total() const { return round_up(payload(slots), kOwnBlock); }

std::size_t MemoryLayout::flag(std::uint32_t slot) const { return (1 + slot) * kLine; }

std::size_t MemoryLayout::payload(std::uint32_t slot) const {
  return round_up(flag(slots), kAlignment) + slot * round_up(slot_bytes, kAlignment);
}

OwnMemory::OwnMemory(std::shared_ptr<const Gpu> gpu, std::shared_ptr<const Control> control, const MemoryLayout& layout,
                     const Stream& stream)
    : gpu_(std::move(gpu)), control_(std::move(control)), layout_(layout) {
  const Driver& driver = gpu_->driver();
  const Current current(*gpu_);
  const Result result = driver.allocate(&base_, layout_.total());
  if (result == kOutOfMemory) {
    std::size_t free = 0, total = 0;
    driver.memory_info(&free, &total);
    throw NamedError("OutOfDeviceMemory", "the buffers between ranks cannot be allocated on " + gpu_->name(),
                     std::to_string(free) + " bytes free", std::to_string(layout_.total()) + " bytes",
                     "use smaller micro-batches or a plan with fewer slots, or free memory");
  }
  driver.check(result, "cuMemAlloc on " + gpu_->name());
  try {
    initialise(stream);
    export_to_peers();
  } catch (...) {
    driver.free(base_);
    throw;
  }
}

void OwnMemory::initialise(const Stream& stream) {
  if (::getrandom(offer_.nonce.data(), offer_.nonce.size(), 0) != static_cast<ssize_t>(offer_.nonce.size()))
    throw std::system_error(errno, std::generic_category(), "getrandom");
  const Driver& driver = gpu_->driver();
  const MemoryProof proof{offer_.nonce, layout_.slot_bytes, layout_.slots};
  driver.check(driver.fill(base_, 0, layout_.payload(0), stream.get()), "cuMemsetD8Async on " + gpu_->name());
  driver.check(driver.copy_in(base_, &proof, sizeof proof, stream.get()), "cuMemcpyHtoDAsync on " + gpu_->name());
  stream.synchronize();
}

void OwnMemory::export_to_peers() {
  const Driver& driver = gpu_->driver();
  int capable = 1;  // a driver that does not know the question is asked for the handle itself
  driver.pointer_attribute(&capable, kLegacyIpcCapable, base_);
  const Result result = capable != 0 ? driver.ipc_export(&offer_.handle, base_) : Result{kNotSupported};
  if (result != kSuccess)
    throw NamedError("NativeUnavailable", gpu_->name() + " exports no memory to other processes",
                     "cuIpcGetMemHandle: " + driver.text(result), "CUDA IPC",
                     "it is missing under WSL, on some MIG instances and on integrated GPUs");
}

OwnMemory::~OwnMemory() {
  if (!gpu_->is_ours() || control_->aborted()) return;
  try {
    const Current current(*gpu_);
    gpu_->driver().free(base_);
  } catch (const std::exception&) {  // the driver is gone
  }
}

PeerMemory::PeerMemory(std::shared_ptr<const Gpu> gpu, const MemoryOffer& offer, const MemoryLayout& layout,
                       const Stream& stream, int self, int peer)
    : gpu_(std::move(gpu)), layout_(layout) {
  const Driver& driver = gpu_->driver();
  const Current current(*gpu_);
  const std::string problem =
      "rank " + std::to_string(self) + " cannot map the device memory of rank " + std::to_string(peer);
  if (const Result result = driver.ipc_import(&base_, offer.handle, kLazyPeerAccess); result != kSuccess)
    throw NamedError("NativeUnavailable", problem, "cuIpcOpenMemHandle on " + gpu_->name() + ": " + driver.text(result),
                     "CUDA IPC between their GPUs",
                     "run all ranks of a host in one container, or in ones that share process and IPC namespaces");
  const MemoryProof needed{offer.nonce, layout.slot_bytes, layout.slots};
  MemoryProof found{};
  const Result copied = driver.copy_out(&found, base_, sizeof found, stream.get());
  if (copied == kSuccess && driver.stream_synchronize(stream.get()) == kSuccess && found == needed) return;
  driver.ipc_close(base_);
  throw NamedError("NativeUnavailable", problem, copied == kSuccess ? "other memory" : driver.text(copied),
                   "the memory that rank " + std::to_string(peer) + " offered", "");
}

PeerMemory::~PeerMemory() {
  if (!gpu_->is_ours()) return;
  try {
    const Current current(*gpu_);
    gpu_->driver().ipc_close(base_);
  } catch (const std::exception&) {  // the driver is gone
  }
}

}  // namespace pipex::device
