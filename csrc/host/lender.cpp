#include "host/lender.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "host/process.hpp"

namespace pipex {
namespace {

constexpr dlpack::Device kHost{dlpack::kCpu, 0};
Loan nothing;  // of a message without tensors, whose slot is back before it is looked at

void let_go(dlpack::ManagedTensor* managed) { static_cast<LentTensor*>(managed->context)->loan->give_back(); }

}  // namespace

void Loan::give_back() {
  if (in_use.fetch_sub(1) > 1) return;
  const std::shared_ptr<Lender> owner = std::move(lender);  // may be its last one: freed after the lock
  if (copy != nullptr) {
    delete this;
    return;
  }
  if (fork_generation() != owner->generation_) return;  // the parent still holds the tensors
  const std::lock_guard<std::mutex> lock(owner->mutex_);
  --owner->lent_;
  owner->is_lent_[slot] = false;
  if (owner->release(slot)) owner->free_.push(slot);
}

Received::~Received() {
  if (loan_ != nullptr)
    for (std::size_t left = loan_->tensors.size() - next_; left > 0; --left) loan_->give_back();
}

dlpack::ManagedTensor* Received::release() {
  LentTensor& tensor = loan_->tensors[next_++];
  if (next_ == loan_->tensors.size()) loan_ = nullptr;
  return &tensor.managed;
}

Lender::Lender(const RingLayout& layout, std::uint32_t alive)
    : layout_(layout),
      ring_(Segment::create(layout.total())),
      alive_(alive),
      generation_(fork_generation()),
      loans_(layout.slots),
      memories_(layout.slots),
      mapped_(layout.slots, 0),
      free_(ring_.data() + layout.free_queue(), layout.slots),
      is_lent_(layout.slots, false) {}

const Segment& Lender::memory(std::uint32_t slot) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    check_free(slot);  // so nobody uses what is unmapped below
  }
  auto& cell = *reinterpret_cast<SlotCell*>(ring_.data() + layout_.cell(slot));
  const std::uint64_t generation = cell.generation.load();
  if (!memories_[slot] || mapped_[slot] != generation) {
    const Address address = cell.address;  // copied: it lies in shared memory
    memories_[slot].reset();
    memories_[slot].emplace(Segment::open(address));
    memories_[slot]->close_descriptor();
    mapped_[slot] = generation;
    cell.opened.store(generation);
  }
  return *memories_[slot];
}

bool Lender::may_lend() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lent_ < alive_;
}

void Lender::check_free(std::uint32_t slot) const {
  if (is_lent_[slot]) throw corrupt_ring("slot " + std::to_string(slot) + " filled while in use", "a free slot");
}

Received Lender::receive(std::uint32_t slot, const MessageForm& form) {
  Received received = lend(slot, form, memories_[slot]->data() + form.payload(), kHost);
  return received.empty() ? copy_out(slot, form) : std::move(received);
}

Received Lender::lend(std::uint32_t slot, const MessageForm& form, std::byte* payload, dlpack::Device device) {
  if (form.count() == 0) {  // nothing that could be held
    give_back(slot);
    return Received(&nothing);
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    check_free(slot);
    if (lent_ == alive_) return {};
    ++lent_;
    is_lent_[slot] = true;
  }
  loans_[slot].slot = slot;
  return hand_over(loans_[slot], payload, form, device);
}

void Lender::give_back(std::uint32_t slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_free(slot);
  if (release(slot)) free_.push(slot);
}

Received Lender::hand_over(Loan& loan, std::byte* payload, const MessageForm& form, dlpack::Device device) {
  loan.tensors.resize(form.count());  // nobody holds any of them
  for (std::size_t i = 0; i < form.count(); ++i) {
    const TensorRecord& record = form.tensor(i);
    LentTensor& tensor = loan.tensors[i];
    std::copy_n(record.shape, record.dimensions, tensor.shape);
    std::copy_n(record.strides, record.dimensions, tensor.strides);
    tensor.loan = &loan;
    tensor.managed.tensor = {
        payload + record.offset, device, record.dimensions, {record.code, record.bits, 1}, tensor.shape,
        tensor.strides,          0};
    tensor.managed.context = &tensor;
    tensor.managed.deleter = let_go;
  }
  loan.lender = shared_from_this();
  loan.in_use.store(form.count());
  return Received(&loan);
}

std::uint32_t Lender::lent() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lent_;
}

Received Lender::copy_out(std::uint32_t slot, const MessageForm& form) {
  auto loan = std::make_unique<Loan>();
  const std::size_t rounded =
      std::max<std::size_t>(1, (form.payload_bytes() + kTensorAlignment - 1) / kTensorAlignment) * kTensorAlignment;
  loan->copy.reset(static_cast<std::byte*>(std::aligned_alloc(kTensorAlignment, rounded)));
  if (loan->copy == nullptr) throw std::bad_alloc();
  std::memcpy(loan->copy.get(), memories_[slot]->data() + form.payload(), form.payload_bytes());
  give_back(slot);
  std::byte* const data = loan->copy.get();
  return hand_over(*loan.release(), data, form, kHost);
}

}  // namespace pipex
