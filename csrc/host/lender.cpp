#include "host/lender.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <utility>

namespace pipex {
namespace {

constexpr std::size_t kAlignment = 64;  // what torch's own allocator gives

void release(dlpack::ManagedTensor* managed) { GiveBack()(static_cast<Loan*>(managed->context)); }

}  // namespace

void GiveBack::operator()(Loan* loan) const {
  const std::shared_ptr<Lender> lender = std::move(loan->lender);  // may be its last owner: freed after the lock
  if (loan->copy != nullptr) {
    delete loan;
    return;
  }
  if (fork_generation() != lender->generation_) return;  // the parent still holds the tensor
  const std::lock_guard<std::mutex> lock(lender->mutex_);
  --lender->lent_;
  lender->is_lent_[loan->slot] = false;
  lender->free_.push(loan->slot);
}

Lender::Lender(const RingLayout& layout, std::uint32_t alive)
    : layout_(layout),
      alive_(alive),
      generation_(fork_generation()),
      segment_(Segment::create(layout.total())),
      loans_(layout.slots),
      free_(segment_.data() + layout.free_queue(), layout.slots),
      is_lent_(layout.slots, false) {}

LoanPtr Lender::lend(std::uint32_t slot, const TensorTemplate& tensor) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_lent_[slot]) throw corrupt_ring("slot " + std::to_string(slot) + " filled while in use", "a free slot");
    if (lent_ == alive_) return copy_out(slot, tensor);
    ++lent_;
    is_lent_[slot] = true;
  }
  loans_[slot].slot = slot;
  return hand_over(loans_[slot], segment_.data() + layout_.payload(slot), tensor);
}

LoanPtr Lender::copy_out(std::uint32_t slot, const TensorTemplate& tensor) {
  auto loan = std::make_unique<Loan>();
  const std::size_t rounded = std::max<std::size_t>(1, (tensor.bytes + kAlignment - 1) / kAlignment) * kAlignment;
  loan->copy.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded)));
  if (loan->copy == nullptr) throw std::bad_alloc();
  std::memcpy(loan->copy.get(), segment_.data() + layout_.payload(slot), tensor.bytes);
  free_.push(slot);
  std::byte* data = loan->copy.get();
  return hand_over(*loan.release(), data, tensor);
}

LoanPtr Lender::hand_over(Loan& loan, std::byte* data, const TensorTemplate& tensor) {
  std::copy_n(tensor.shape, tensor.dimensions, loan.shape);
  std::copy_n(tensor.strides, tensor.dimensions, loan.strides);
  loan.managed.tensor = {data, {dlpack::kCpu, 0}, tensor.dimensions, tensor.dtype, loan.shape, loan.strides, 0};
  loan.managed.context = &loan;
  loan.managed.deleter = release;
  loan.lender = shared_from_this();
  return LoanPtr(&loan);
}

std::uint32_t Lender::lent() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lent_;
}

}  // namespace pipex
