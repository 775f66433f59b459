// The consumer's slots, each lent to the tensors that arrived in it until the last reference to them is gone.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "host/dlpack.hpp"
#include "host/message.hpp"
#include "host/ring_layout.hpp"
#include "host/segment.hpp"

namespace pipex {

class Lender;
struct Loan;

struct FreeAligned {
  void operator()(std::byte* memory) const { std::free(memory); }
};

/// A received tensor as torch sees it.
struct LentTensor {
  dlpack::ManagedTensor managed{};
  std::int64_t shape[kMaxDimensions];
  std::int64_t strides[kMaxDimensions];
  Loan* loan = nullptr;
};

/// A received message. One for every slot is made with the ring, so that a receive allocates nothing.
struct Loan {
  std::vector<LentTensor> tensors;
  std::atomic<std::size_t> in_use{0};  // of them
  std::uint32_t slot = 0;
  std::unique_ptr<std::byte, FreeAligned> copy;  // instead of a slot, where the caller keeps more than planned
  std::shared_ptr<Lender> lender;                // while it is lent: memory outlives the ring and the world

  /// Lets go of one tensor. Runs on any thread, also after the ring is closed, and never touches Python.
  void give_back();
};

/// The tensors of a message, each of which must be let go of.
class Received {
 public:
  Received() = default;
  explicit Received(Loan* loan) : loan_(loan) {}
  Received(Received&& other) noexcept : loan_(std::exchange(other.loan_, nullptr)), next_(other.next_) {}
  Received& operator=(Received&& other) noexcept {
    std::swap(loan_, other.loan_);
    std::swap(next_, other.next_);
    return *this;
  }
  ~Received();

  bool empty() const { return loan_ == nullptr; }
  std::size_t count() const { return loan_->tensors.size(); }
  const LentTensor& operator[](std::size_t index) const { return loan_->tensors[index]; }

  /// The next tensor, which the caller lets go of by `managed.deleter`.
  dlpack::ManagedTensor* release();

 private:
  Loan* loan_ = nullptr;
  std::size_t next_ = 0;
};

/// Owns the shared memory. Nothing is copied: the producer wrote the tensors where the consumer reads them, and does
/// not get the slot back before autograd's saved tensors and all views are gone.
class Lender : public std::enable_shared_from_this<Lender> {
 public:
  /// Lends at most `alive` slots at once, so that the others stay for messages under way. Throws OutOfSharedMemory.
  Lender(const RingLayout& layout, std::uint32_t alive);
  virtual ~Lender() = default;

  Segment& ring() { return ring_; }
  const RingLayout& layout() const { return layout_; }

  /// The memory of a slot that the producer has filled; mapped here if it is new. Throws MessageMismatch if the
  /// producer does not own the slot, InputError if its memory cannot be mapped.
  const Segment& memory(std::uint32_t slot);

  /// Whether fewer than `alive` slots are lent. Holds until the next loan: slots only come back by themselves.
  bool may_lend();

  /// Makes a message in its slot's memory tensors; in memory of their own where `alive` slots are lent already.
  /// Throws MessageMismatch if the producer has filled a slot that it does not own.
  Received receive(std::uint32_t slot, const MessageForm& form);

  /// Slots lent now.
  std::uint32_t lent();

 protected:
  /// Lends a slot whose tensors begin at `payload` on `device`; empty where it may not. Throws as `receive`.
  Received lend(std::uint32_t slot, const MessageForm& form, std::byte* payload, dlpack::Device device);

  /// What must happen before the producer may fill a slot again; false if it must not any more. The lock is held.
  virtual bool release(std::uint32_t) noexcept { return true; }

  /// Throws MessageMismatch if the producer has filled a slot that it does not own. The lock is held.
  void check_free(std::uint32_t slot) const;

  /// Gives a slot back that was never lent: its payload was copied out. Throws MessageMismatch as `lend`.
  void give_back(std::uint32_t slot);

  const RingLayout layout_;
  Segment ring_;
  std::mutex mutex_;

 private:
  friend struct Loan;

  Received copy_out(std::uint32_t slot, const MessageForm& form);
  Received hand_over(Loan& loan, std::byte* payload, const MessageForm& form, dlpack::Device device);

  const std::uint32_t alive_;
  const int generation_;
  std::vector<Loan> loans_;  // by slot
  std::vector<std::optional<Segment>> memories_;
  std::vector<std::uint64_t> mapped_;  // the generation of each memory
  IndexQueue free_;
  std::uint32_t lent_ = 0;
  std::vector<bool> is_lent_;  // by slot
};

}  // namespace pipex
