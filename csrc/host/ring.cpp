#include "host/ring.hpp"

#include <stdexcept>
#include <utility>

#include "host/copy.hpp"

namespace pipex {
namespace {

RingLayout layout_of(const RingSize& size) { return {size.bytes, size.slots()}; }

}  // namespace

RingSender::RingSender(std::shared_ptr<Member> member, int peer, const Address& address, const RingSize& size)
    : bytes_(size.bytes), outbox_(std::move(member), peer, address, layout_of(size)) {}

void RingSender::send(const TensorTemplate& tensor, const std::byte* data, std::uint64_t step,
                      std::uint32_t microbatch) {
  const std::uint32_t slot = outbox_.take();
  // Of a tensor larger than announced only the header goes: it is enough for the receiver to name the mistake.
  if (tensor.bytes > 0 && tensor.bytes <= bytes_) copy_message(outbox_.payload(slot), data, tensor.bytes);
  outbox_.publish(slot, tensor, step, microbatch);
}

RingReceiver::RingReceiver(std::shared_ptr<Member> member, int peer, const RingSize& size)
    : bytes_(size.bytes),
      lender_(std::make_shared<HostLender>(layout_of(size), size.alive)),
      inbox_(std::move(member), peer, *lender_, size.slots()) {}

LoanPtr RingReceiver::receive(const TensorTemplate& tensor, std::uint64_t step, std::uint32_t microbatch) {
  if (tensor.bytes > bytes_) throw std::invalid_argument("a tensor larger than its edge was opened for");
  const std::uint32_t slot = inbox_.front(tensor, step, microbatch);
  LoanPtr loan = lender_->lend(slot, tensor);
  if (loan == nullptr) loan = lender_->copy_out(slot, tensor);
  inbox_.pop();
  return loan;
}

}  // namespace pipex
