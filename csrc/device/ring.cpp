#include "device/ring.hpp"

#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/named_error.hpp"

namespace pipex::device {
namespace {

MemoryLayout payloads_of(const RingSize& size) { return {size.bytes, size.slots()}; }
MemoryLayout flags_of(const RingSize& size) { return {0, size.slots()}; }
RingLayout host_part_of(const RingSize& size) { return {0, size.slots()}; }

std::shared_ptr<OwnMemory> allocate(const Rank& rank, const MemoryLayout& layout) {
  const std::shared_ptr<const Control> control(rank.shared_member(), &rank.member().control());
  return std::make_shared<OwnMemory>(rank.gpu(), control, layout, rank.send_stream());
}

std::unique_ptr<PeerMemory> map(const Rank& rank, const MemoryOffer& offer, const MemoryLayout& layout, int peer) {
  return std::make_unique<PeerMemory>(rank.gpu(), offer, layout, rank.send_stream(), rank.member().rank(), peer);
}

}  // namespace

RingSender::RingSender(std::shared_ptr<Rank> rank, int peer, const RingSize& size)
    : rank_(std::move(rank)),
      peer_(peer),
      size_(size),
      memory_(allocate(*rank_, flags_of(size))),
      watched_(rank_->watch(*memory_, size.slots())),
      uses_(size.slots()) {}

void RingSender::connect(const Address& address, const MemoryOffer& slots) {
  outbox_.emplace(rank_->shared_member(), peer_, address, host_part_of(size_));
  slots_ = map(*rank_, slots, payloads_of(size_), peer_);
}

void RingSender::send(const TensorTemplate& tensor, DevicePointer source, StreamHandle compute, std::uint64_t step,
                      std::uint32_t microbatch) {
  const Current current(*rank_->gpu());
  const Driver& driver = rank_->driver();
  const StreamHandle stream = rank_->send_stream().get();
  rank_->check_not_capturing(compute);
  rank_->member().control().raise_if_aborted();  // now: once something is enqueued, the source must be kept
  const std::uint32_t slot = outbox_->take();
  const std::uint64_t use = ++uses_[slot];
  const EventHandle computed = rank_->sends().begin(peer_, compute);
  driver.check(driver.stream_wait_event(stream, computed, 0), "cuStreamWaitEvent on " + rank_->gpu()->name());
  if (use > 1)
    driver.check(driver.stream_wait(stream, memory_->flag(slot), use - 1, kWaitGreaterOrEqual),
                 "cuStreamWaitValue64 before a send to rank " + std::to_string(peer_));
  // Of a tensor larger than announced only the header goes: it is enough for the receiver to name the mistake.
  if (tensor.bytes > 0 && tensor.bytes <= size_.bytes)
    driver.check(driver.copy(slots_->payload(slot), source, tensor.bytes, stream),
                 "cuMemcpyDtoDAsync to rank " + std::to_string(peer_));
  driver.check(driver.stream_write(stream, slots_->flag(slot), use, kWriteWithFence),
               "cuStreamWriteValue64 to rank " + std::to_string(peer_));
  rank_->sends().end(stream);
  outbox_->publish(slot, tensor, step, microbatch);
}

void RingSender::close() noexcept {
  if (!watched_) return;
  if (rank_->gpu()->is_ours()) {
    const bool drained = rank_->drain(rank_->send_stream().get());
    // What a stuck stream still uses is left mapped: the run has ended, and the process is about to.
    if (!drained) static_cast<void>(slots_.release());
    slots_.reset();
    rank_->forget(*watched_);
  }
  watched_.reset();
  rank_->retire(std::move(memory_));
}

DeviceLender::DeviceLender(std::shared_ptr<Rank> rank, const RingSize& size)
    : Lender(host_part_of(size), size.alive, rank->device()),
      rank_(std::move(rank)),
      size_(size),
      memory_(allocate(*rank_, payloads_of(size))),
      uses_(size.slots()) {}

void DeviceLender::connect(const MemoryOffer& released, int peer) {
  released_ = map(*rank_, released, flags_of(size_), peer);
}

void DeviceLender::await(std::uint32_t slot, StreamHandle stream, int peer) {
  std::uint64_t messages;
  {
    const std::lock_guard lock(mutex_);
    check_free(slot);
    uses_[slot].stream = stream;
    messages = ++uses_[slot].messages;
  }
  rank_->receives().begin(peer, stream);
  const Driver& driver = rank_->driver();
  driver.check(driver.stream_wait(stream, memory_->flag(slot), messages, kWaitGreaterOrEqual),
               "cuStreamWaitValue64 for a tensor of rank " + std::to_string(peer));
  rank_->receives().end(stream);
}

void DeviceLender::copy_out(std::uint32_t slot, const TensorTemplate& tensor, DevicePointer to) {
  const Driver& driver = rank_->driver();
  if (tensor.bytes > 0)
    driver.check(driver.copy(to, memory_->payload(slot), tensor.bytes, uses_[slot].stream),
                 "cuMemcpyDtoDAsync out of a slot");
  give_back(slot);
}

std::byte* DeviceLender::payload(std::uint32_t slot) const {
  return reinterpret_cast<std::byte*>(memory_->payload(slot));
}

bool DeviceLender::release(std::uint32_t slot) noexcept {
  if (released_ == nullptr || failure_ != nullptr) return false;
  try {
    const Current current(*rank_->gpu());
    const Use& use = uses_[slot];
    rank_->check_not_capturing(use.stream);
    rank_->driver().check(
        rank_->driver().stream_write(use.stream, released_->flag(slot), use.messages, kWriteWithFence),
        "cuStreamWriteValue64 to give a slot back");
    return true;
  } catch (...) {
    failure_ = std::current_exception();
    return false;
  }
}

void DeviceLender::raise_failure() {
  const std::lock_guard lock(mutex_);
  if (failure_ != nullptr) std::rethrow_exception(failure_);
}

void DeviceLender::close() noexcept {
  std::unique_ptr<PeerMemory> released;
  std::set<StreamHandle> streams;
  {
    const std::lock_guard lock(mutex_);
    released = std::move(released_);
    for (const Use& use : uses_)
      if (use.messages > 0) streams.insert(use.stream);
  }
  bool drained = true;
  for (const StreamHandle stream : streams) drained = rank_->drain(stream) && drained;
  if (!drained) static_cast<void>(released.release());  // see RingSender::close
}

RingReceiver::RingReceiver(std::shared_ptr<Rank> rank, int peer, const RingSize& size)
    : rank_(std::move(rank)),
      peer_(peer),
      size_(size),
      lender_(std::make_shared<DeviceLender>(rank_, size)),
      watched_(rank_->watch(*lender_->memory(), size.slots())),
      inbox_(rank_->shared_member(), peer, *lender_, size.slots()) {}

std::uint32_t RingReceiver::front(const TensorTemplate& tensor, StreamHandle compute, std::uint64_t step,
                                  std::uint32_t microbatch) {
  if (tensor.bytes > size_.bytes) throw std::invalid_argument("a tensor larger than its edge was opened for");
  lender_->raise_failure();
  rank_->check_not_capturing(compute);
  return inbox_.front(tensor, step, microbatch);
}

LoanPtr RingReceiver::receive(const TensorTemplate& tensor, StreamHandle compute, std::uint64_t step,
                              std::uint32_t microbatch) {
  const Current current(*rank_->gpu());
  const std::uint32_t slot = front(tensor, compute, step, microbatch);
  if (!lender_->may_lend()) return nullptr;
  lender_->await(slot, compute, peer_);
  LoanPtr loan = lender_->lend(slot, tensor);
  pop();
  return loan;
}

void RingReceiver::receive_into(const TensorTemplate& tensor, DevicePointer to, StreamHandle compute,
                                std::uint64_t step, std::uint32_t microbatch) {
  const Current current(*rank_->gpu());
  const std::uint32_t slot = front(tensor, compute, step, microbatch);
  lender_->await(slot, compute, peer_);
  lender_->copy_out(slot, tensor, to);
  pop();
}

void RingReceiver::pop() {
  inbox_.pop();
  rank_->member().control().raise_if_aborted();  // else the rescue may be what has ended the wait
}

void RingReceiver::close() noexcept {
  if (!watched_) return;
  if (rank_->gpu()->is_ours()) {
    lender_->close();
    rank_->forget(*watched_);
  }
  watched_.reset();
  rank_->retire(lender_->memory());
}

}  // namespace pipex::device
