#include "host/ring.hpp"

#include <utility>

#include "host/copy.hpp"

namespace pipex {

void RingSender::send(const MessageForm& form, const std::vector<std::uintptr_t>& tensors, std::uint64_t step,
                      std::uint32_t microbatch) {
  const std::uint32_t slot = outbox_.take();
  std::byte* const payload = outbox_.memory(slot, form.total()) + form.payload();
  for (std::size_t i = 0; i < form.count(); ++i)
    if (form.span(i) > 0) copy_message(payload + form.tensor(i).offset, reinterpret_cast<const std::byte*>(tensors[i]), form.span(i));
  outbox_.publish(slot, form, kInSlot, step, microbatch);
}

RingReceiver::RingReceiver(std::shared_ptr<Member> member, int peer, const RingSize& size, const MessageHeader& edge)
    : lender_(std::make_shared<Lender>(RingLayout{size.slots()}, size.alive, dlpack::Device{dlpack::kCpu, 0})),
      inbox_(std::move(member), peer, *lender_, edge) {}

Received RingReceiver::receive(std::uint64_t step, std::uint32_t microbatch, const MessageForm*& form) {
  const std::uint32_t slot = inbox_.front(step, microbatch);
  form = inbox_.is_new_form() ? &inbox_.form() : nullptr;
  if (inbox_.place() != kInSlot) throw corrupt_ring("a message in device memory", "one in host memory");
  Received received = lender_->lend(slot, inbox_.form());
  if (received.empty()) received = lender_->copy_out(slot, inbox_.form());
  inbox_.pop();
  return received;
}

}  // namespace pipex
