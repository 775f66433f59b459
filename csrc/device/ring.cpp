#include "device/ring.hpp"

#include <algorithm>
#include <cstring>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "common/named_error.hpp"

namespace pipex::device {
namespace {

// A header has a byte for it. Half more each time never gets there; where memory is short it is less.
constexpr std::size_t kMostGenerations = 255;

MemoryLayout flags_of(const RingSize& size) { return {0, size.slots()}; }

std::shared_ptr<OwnMemory> allocate(const Rank& rank, const MemoryLayout& layout) {
  const std::shared_ptr<const Control> control(rank.shared_member(), &rank.member().control());
  return std::make_shared<OwnMemory>(rank.gpu(), control, layout, rank.ready_stream());
}

std::unique_ptr<PeerMemory> map(const Rank& rank, const MemoryOffer& offer, const MemoryLayout& layout, int peer) {
  return std::make_unique<PeerMemory>(rank.gpu(), offer, layout, rank.ready_stream(), rank.member().rank(), peer);
}

}  // namespace

RingSender::RingSender(std::shared_ptr<Rank> rank, int peer, const RingSize& size, const MessageHeader& edge)
    : rank_(std::move(rank)),
      peer_(peer),
      size_(size),
      edge_(edge),
      memory_(allocate(*rank_, flags_of(size))),
      watched_(rank_->watch(*memory_, size.slots())),
      uses_(size.slots()) {}

void RingSender::connect(const Address& address, const MemoryOffer& written) {
  outbox_.emplace(rank_->shared_member(), peer_, address, size_, edge_);
  written_ = map(*rank_, written, flags_of(size_), peer_);
}

bool RingSender::fits(std::size_t payload_bytes, StreamHandle compute) {
  const Current current(*rank_->gpu());
  rank_->check_not_capturing(compute);  // before anything is mapped: that would become a part of the graph
  auto& offer = *reinterpret_cast<PayloadOffer*>(outbox_->offer());
  const std::uint32_t generation = offer.generation.load();
  if (generation != payloads_.size()) {
    if (generation != payloads_.size() + 1)  // the consumer waits until its last offer was taken
      throw corrupt_ring("device memory of generation " + std::to_string(generation),
                         std::to_string(payloads_.size() + 1));
    const std::uint64_t bytes = offer.bytes;  // copied, as all of it: it lies in shared memory
    const MemoryOffer memory = offer.memory;
    try {
      payloads_.push_back(map(*rank_, memory, {bytes, size_.slots()}, peer_));
    } catch (const NamedError&) {
      rank_->member().raise_if_ending();
      throw;
    }
    payload_bytes_ = bytes;
    mapped_bytes_ += bytes * size_.slots();
    offer.taken.store(generation);
  }
  return !payloads_.empty() && payload_bytes <= payload_bytes_;
}

void RingSender::send(const MessageForm& form, const std::vector<std::uintptr_t>& tensors, StreamHandle compute,
                      std::uint64_t step, std::uint32_t microbatch) {
  const Current current(*rank_->gpu());
  const Driver& driver = rank_->driver();
  const StreamHandle stream = rank_->send_stream().get();
  rank_->check_not_capturing(compute);
  rank_->member().control().raise_if_aborted();  // now: once something is enqueued, the source must be kept
  const std::uint32_t slot = outbox_->take();
  outbox_->memory(slot, form.payload());
  const std::uint64_t use = ++uses_[slot];
  const EventHandle computed = rank_->sends().begin(peer_, compute);
  driver.check(driver.stream_wait_event(stream, computed, 0), "cuStreamWaitEvent on " + rank_->gpu()->name());
  if (use > 1)
    driver.check(driver.stream_wait(stream, memory_->flag(slot), use - 1, kWaitGreaterOrEqual),
                 "cuStreamWaitValue64 before a send to rank " + std::to_string(peer_));
  const DevicePointer payload = payloads_.back()->payload(slot);
  for (std::size_t i = 0; i < form.count(); ++i)
    if (form.span(i) > 0)
      driver.check(driver.copy(payload + form.tensor(i).offset, tensors[i], form.span(i), stream),
                   "cuMemcpyDtoDAsync to rank " + std::to_string(peer_));
  driver.check(driver.stream_write(stream, written_->flag(slot), use, kWriteWithFence),
               "cuStreamWriteValue64 to rank " + std::to_string(peer_));
  rank_->sends().end(stream);
  outbox_->publish(slot, form, static_cast<std::uint8_t>(payloads_.size()), step, microbatch);
}

void RingSender::send_from_host(const MessageForm& form, const std::vector<std::uintptr_t>& tensors, std::uint64_t step,
                                std::uint32_t microbatch) {
  outbox_->send(form, tensors, step, microbatch);
}

void RingSender::close() noexcept {
  if (!watched_) return;
  if (rank_->gpu()->is_ours()) {
    const bool drained = rank_->drain(rank_->send_stream().get());
    // What a stuck stream still uses is left mapped: the run has ended, and the process is about to.
    if (!drained) {
      static_cast<void>(written_.release());
      for (auto& payloads : payloads_) static_cast<void>(payloads.release());
    }
    written_.reset();
    payloads_.clear();
    rank_->forget(*watched_);
  }
  watched_.reset();
  rank_->retire(std::move(memory_));
}

DeviceLender::DeviceLender(std::shared_ptr<Rank> rank, const RingSize& size)
    : Lender(RingLayout{size.slots()}, size.alive),
      rank_(std::move(rank)),
      slots_(size.slots()),
      written_(allocate(*rank_, flags_of(size))),
      uses_(size.slots()),
      on_device_(size.slots(), false) {}

void DeviceLender::connect(const MemoryOffer& released, int peer) {
  released_ = map(*rank_, released, {0, slots_}, peer);
}

DeviceLender::Payloads DeviceLender::make(std::size_t bytes) const {
  return {bytes, allocate(*rank_, {bytes, slots_})};
}

void DeviceLender::grow(std::size_t bytes) {
  const std::size_t before = payloads_.empty() ? 0 : payloads_.back().bytes;
  const bool taken = offer().taken.load() == payloads_.size();
  if (bytes <= std::max(before, refused_) || !taken || payloads_.size() == kMostGenerations) return;
  const std::size_t half_more = before + before / 2;
  try {
    payloads_.push_back(make(std::max(bytes, half_more)));
  } catch (const NamedError& error) {
    if (std::string_view(error.python_class) != "OutOfDeviceMemory" || bytes >= half_more) throw;
    payloads_.push_back(make(bytes));
  }
  offer().bytes = payloads_.back().bytes;
  offer().memory = payloads_.back().memory->offer();
  offer().generation.store(static_cast<std::uint32_t>(payloads_.size()));
}

void DeviceLender::check_place(std::uint8_t place, const MessageForm& form) const {
  if (place > payloads_.size() || form.payload_bytes() > payloads_[place - 1].bytes)
    throw corrupt_ring(
        std::to_string(form.payload_bytes()) + " bytes in device memory of generation " + std::to_string(place),
        "a payload within memory that was offered");
}

void DeviceLender::await(std::uint32_t slot, StreamHandle stream, int peer) {
  std::uint64_t messages;
  {
    const std::lock_guard lock(mutex_);
    check_free(slot);
    uses_[slot].stream = stream;
    messages = ++uses_[slot].messages;
    on_device_[slot] = true;
  }
  rank_->receives().begin(peer, stream);
  const Driver& driver = rank_->driver();
  driver.check(driver.stream_wait(stream, written_->flag(slot), messages, kWaitGreaterOrEqual),
               "cuStreamWaitValue64 for a message of rank " + std::to_string(peer));
  rank_->receives().end(stream);
}

Received DeviceLender::lend_payload(std::uint32_t slot, std::uint8_t place, const MessageForm& form) {
  const DevicePointer payload = payloads_[place - 1].memory->payload(slot);
  return lend(slot, form, reinterpret_cast<std::byte*>(payload), rank_->device());
}

void DeviceLender::copy_out(std::uint32_t slot, std::uint8_t place, const MessageForm& form,
                            const std::vector<std::uintptr_t>& to) {
  const Driver& driver = rank_->driver();
  const DevicePointer payload = payloads_[place - 1].memory->payload(slot);
  for (std::size_t i = 0; i < form.count(); ++i)
    if (form.span(i) > 0)
      driver.check(driver.copy(to[i], payload + form.tensor(i).offset, form.span(i), uses_[slot].stream),
                   "cuMemcpyDtoDAsync out of a slot");
  give_back(slot);
}

bool DeviceLender::release(std::uint32_t slot) noexcept {
  if (!on_device_[slot]) return true;
  on_device_[slot] = false;
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

std::vector<std::shared_ptr<OwnMemory>> DeviceLender::close() noexcept {
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
  std::vector<std::shared_ptr<OwnMemory>> mapped{written_};
  for (const Payloads& payloads : payloads_) mapped.push_back(payloads.memory);
  return mapped;
}

RingReceiver::RingReceiver(std::shared_ptr<Rank> rank, int peer, const RingSize& size, const MessageHeader& edge)
    : rank_(std::move(rank)),
      peer_(peer),
      lender_(std::make_shared<DeviceLender>(rank_, size)),
      watched_(rank_->watch(*lender_->written(), size.slots())),
      inbox_(rank_->shared_member(), peer, *lender_, edge) {}

std::uint32_t RingReceiver::front(StreamHandle compute, std::uint64_t step, std::uint32_t microbatch) {
  lender_->raise_failure();
  rank_->check_not_capturing(compute);
  const std::uint32_t slot = inbox_.front(step, microbatch);
  if (inbox_.place() != kInSlot) lender_->check_place(inbox_.place(), inbox_.form());
  return slot;
}

Received RingReceiver::receive(StreamHandle compute, std::uint64_t step, std::uint32_t microbatch, bool may_grow,
                               const MessageForm*& form) {
  const Current current(*rank_->gpu());
  const std::uint32_t slot = front(compute, step, microbatch);
  Received received;
  if (inbox_.place() == kInSlot) {
    const std::size_t bytes = inbox_.form().payload_bytes();
    if (may_grow)
      lender_->grow(bytes);
    else
      lender_->refuse(bytes);
    received = lender_->receive(slot, inbox_.form());
  } else if (lender_->may_lend()) {
    lender_->await(slot, compute, peer_);
    received = lender_->lend_payload(slot, inbox_.place(), inbox_.form());
  }
  form = inbox_.news();
  if (!received.empty()) pop();
  return received;
}

void RingReceiver::receive_into(const std::vector<std::uintptr_t>& to, StreamHandle compute, std::uint64_t step,
                                std::uint32_t microbatch) {
  const Current current(*rank_->gpu());
  const std::uint32_t slot = front(compute, step, microbatch);
  // It was read before, for the caller to make memory for it.
  if (inbox_.news() != nullptr || inbox_.place() == kInSlot || to.size() != inbox_.form().count())
    throw corrupt_ring("a message that changes", "one that stays as it was sent");
  lender_->await(slot, compute, peer_);
  lender_->copy_out(slot, inbox_.place(), inbox_.form(), to);
  pop();
}

void RingReceiver::pop() {
  inbox_.pop();
  rank_->member().control().raise_if_aborted();  // else the rescue may be what has ended the wait
}

void RingReceiver::close() noexcept {
  if (!watched_) return;
  if (rank_->gpu()->is_ours()) {
    for (auto& memory : lender_->close()) rank_->retire(std::move(memory));
    rank_->forget(*watched_);
  }
  watched_.reset();
}

}  // namespace pipex::device
