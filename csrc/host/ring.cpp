#include "host/ring.hpp"

#include <utility>

namespace pipex {

RingReceiver::RingReceiver(std::shared_ptr<Member> member, int peer, const RingSize& size, const MessageHeader& edge)
    : lender_(std::make_shared<Lender>(RingLayout{size.slots()}, size.alive)),
      inbox_(std::move(member), peer, *lender_, edge) {}

Received RingReceiver::receive(std::uint64_t step, std::uint32_t microbatch, const MessageForm*& form) {
  const std::uint32_t slot = inbox_.front(step, microbatch);
  if (inbox_.place() != kInSlot) throw corrupt_ring("a message in device memory", "one in host memory");
  Received received = lender_->receive(slot, inbox_.form());
  form = inbox_.news();
  inbox_.pop();
  return received;
}

}  // namespace pipex
