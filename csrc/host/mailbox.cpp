#include "host/mailbox.hpp"

#include <cstring>
#include <string>
#include <utility>

#include "host/errors.hpp"

namespace pipex {

Outbox::Outbox(std::shared_ptr<Member> member, int peer, const Address& address, const RingLayout& layout)
    : member_(std::move(member)),
      peer_(peer),
      layout_(layout),
      segment_(Segment::open(address)),
      ready_(segment_.data(), layout_.slots),
      free_(segment_.data() + layout_.free_queue(), layout_.slots),
      away_(layout_.slots, false) {
  if (segment_.size() != layout_.total())
    throw NamedError("InputError", "rank " + std::to_string(peer) + " offers buffers of another size",
                     std::to_string(segment_.size()) + " bytes", std::to_string(layout_.total()),
                     "use one version of pipex on all ranks");
  segment_.close_descriptor();
  for (std::uint32_t slot = layout_.slots; slot > 0; --slot) stack_.push_back(slot - 1);
}

/// Moves all returned slots to the stack; says whether there is any to take.
bool Outbox::collect() {
  while (const auto slot = free_.peek()) {
    if (!away_[*slot]) throw corrupt_ring("slot " + std::to_string(*slot) + " returned twice", "once");
    away_[*slot] = false;
    stack_.push_back(*slot);
    free_.pop();
  }
  return !stack_.empty();
}

std::uint32_t Outbox::take() {
  if (!collect()) member_->wait(free_.bell(), peer_, [this] { return collect(); });
  const std::uint32_t slot = stack_.back();
  stack_.pop_back();
  away_[slot] = true;
  return slot;
}

void Outbox::publish(std::uint32_t slot, const TensorTemplate& tensor, std::uint64_t step, std::uint32_t microbatch) {
  const TensorHeader header = tensor.header_for(step, microbatch, sequence_);
  std::memcpy(segment_.data() + layout_.header(slot), header.data(), kTensorHeaderBytes);
  ready_.push(slot);
  ++sequence_;
}

Inbox::Inbox(std::shared_ptr<Member> member, int peer, Lender& lender, std::uint32_t slots)
    : member_(std::move(member)), peer_(peer), lender_(lender), ready_(lender.segment().data(), slots) {}

std::uint32_t Inbox::front(const TensorTemplate& tensor, std::uint64_t step, std::uint32_t microbatch) {
  auto slot = ready_.peek();
  if (!slot) member_->wait(ready_.bell(), peer_, [&] { return (slot = ready_.peek()).has_value(); });
  const TensorHeader needed = tensor.header_for(step, microbatch, sequence_);
  TensorHeader got;
  std::memcpy(got.data(), lender_.header(*slot), kTensorHeaderBytes);
  if (got != needed) throw HeaderMismatch(got, needed);
  return *slot;
}

void Inbox::pop() {
  ready_.pop();
  ++sequence_;
}

}  // namespace pipex
