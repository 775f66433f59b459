#include "host/ring.hpp"

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "host/copy.hpp"
#include "host/errors.hpp"

namespace pipex {

RingSender::RingSender(std::shared_ptr<Member> member, int peer, const Address& address, const RingSize& size)
    : member_(std::move(member)),
      peer_(peer),
      layout_(size.layout()),
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
bool RingSender::collect() {
  while (const auto slot = free_.peek()) {
    if (!away_[*slot]) throw corrupt_ring("slot " + std::to_string(*slot) + " returned twice", "once");
    away_[*slot] = false;
    stack_.push_back(*slot);
    free_.pop();
  }
  return !stack_.empty();
}

void RingSender::send(const TensorTemplate& tensor, const std::byte* data, std::uint64_t step,
                      std::uint32_t microbatch) {
  if (!collect()) member_->wait(free_.bell(), peer_, [this] { return collect(); });
  const std::uint32_t slot = stack_.back();
  stack_.pop_back();
  away_[slot] = true;
  const TensorHeader header = tensor.header_for(step, microbatch, sequence_);
  std::memcpy(segment_.data() + layout_.header(slot), header.data(), kTensorHeaderBytes);
  // Of a tensor larger than announced only the header goes: it is enough for the receiver to name the mistake.
  if (tensor.bytes > 0 && tensor.bytes <= layout_.slot_bytes)
    copy_message(segment_.data() + layout_.payload(slot), data, tensor.bytes);
  ready_.push(slot);
  ++sequence_;
}

RingReceiver::RingReceiver(std::shared_ptr<Member> member, int peer, const RingSize& size)
    : member_(std::move(member)),
      peer_(peer),
      layout_(size.layout()),
      lender_(std::make_shared<Lender>(layout_, size.alive)),
      ready_(lender_->segment().data(), layout_.slots) {}

LoanPtr RingReceiver::receive(const TensorTemplate& tensor, std::uint64_t step, std::uint32_t microbatch) {
  if (tensor.bytes > layout_.slot_bytes) throw std::invalid_argument("a tensor larger than its edge was opened for");
  auto slot = ready_.peek();
  if (!slot) member_->wait(ready_.bell(), peer_, [&] { return (slot = ready_.peek()).has_value(); });
  const TensorHeader needed = tensor.header_for(step, microbatch, sequence_);
  TensorHeader got;
  std::memcpy(got.data(), lender_->header(*slot), kTensorHeaderBytes);
  if (got != needed) throw HeaderMismatch(got, needed);
  LoanPtr loan = lender_->lend(*slot, tensor);
  ready_.pop();
  ++sequence_;
  return loan;
}

}  // namespace pipex
