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
  if (lender->release(loan->slot)) lender->free_.push(loan->slot);
}

Lender::Lender(const RingLayout& layout, std::uint32_t alive, dlpack::Device device)
    : layout_(layout),
      segment_(Segment::create(layout.total())),
      alive_(alive),
      device_(device),
      generation_(fork_generation()),
      loans_(layout.slots),
      free_(segment_.data() + layout.free_queue(), layout.slots),
      is_lent_(layout.slots, false) {}

bool Lender::may_lend() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lent_ < alive_;
}

void Lender::check_free(std::uint32_t slot) const {
  if (is_lent_[slot]) throw corrupt_ring("slot " + std::to_string(slot) + " filled while in use", "a free slot");
}

LoanPtr Lender::lend(std::uint32_t slot, const TensorTemplate& tensor) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    check_free(slot);
    if (lent_ == alive_) return nullptr;
    ++lent_;
    is_lent_[slot] = true;
  }
  loans_[slot].slot = slot;
  return hand_over(loans_[slot], payload(slot), tensor);
}

void Lender::give_back(std::uint32_t slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_free(slot);
  if (release(slot)) free_.push(slot);
}

LoanPtr Lender::hand_over(Loan& loan, std::byte* data, const TensorTemplate& tensor) {
  std::copy_n(tensor.shape, tensor.dimensions, loan.shape);
  std::copy_n(tensor.strides, tensor.dimensions, loan.strides);
  loan.managed.tensor = {data, device_, tensor.dimensions, tensor.dtype, loan.shape, loan.strides, 0};
  loan.managed.context = &loan;
  loan.managed.deleter = pipex::release;
  loan.lender = shared_from_this();
  return LoanPtr(&loan);
}

std::uint32_t Lender::lent() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lent_;
}

LoanPtr HostLender::copy_out(std::uint32_t slot, const TensorTemplate& tensor) {
  auto loan = std::make_unique<Loan>();
  const std::size_t rounded = std::max<std::size_t>(1, (tensor.bytes + kAlignment - 1) / kAlignment) * kAlignment;
  loan->copy.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded)));
  if (loan->copy == nullptr) throw std::bad_alloc();
  std::memcpy(loan->copy.get(), payload(slot), tensor.bytes);
  give_back(slot);
  std::byte* data = loan->copy.get();
  return hand_over(*loan.release(), data, tensor);
}

std::byte* HostLender::payload(std::uint32_t slot) const { return segment_.data() + layout_.payload(slot); }

}  // namespace pipex
