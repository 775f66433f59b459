// The consumer's slots, each lent to the tensor that arrived in it until the last reference to that tensor is gone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "host/dlpack.hpp"
#include "host/ring_layout.hpp"
#include "host/segment.hpp"
#include "host/tensor_template.hpp"

namespace pipex {

class Lender;

struct FreeAligned {
  void operator()(std::byte* memory) const { std::free(memory); }
};

/// A received tensor as torch sees it. One for every slot is made with the ring, so that a receive allocates nothing.
struct Loan {
  dlpack::ManagedTensor managed{};
  std::int64_t shape[kMaxDimensions];
  std::int64_t strides[kMaxDimensions];
  std::uint32_t slot = 0;
  std::unique_ptr<std::byte, FreeAligned> copy;  // instead of a slot, where the caller keeps more than planned
  std::shared_ptr<Lender> lender;                // while it is lent: memory outlives the ring and the world
};

/// Runs on any thread, also after the ring is closed, and never touches Python.
struct GiveBack {
  void operator()(Loan* loan) const;
};
using LoanPtr = std::unique_ptr<Loan, GiveBack>;

/// Owns the shared memory. Nothing is copied: the producer wrote the tensor where the consumer reads it, and does not
/// get the slot back before autograd's saved tensors and all views are gone.
class Lender : public std::enable_shared_from_this<Lender> {
 public:
  /// Lends at most `alive` slots at once, so that the others stay for messages under way. Throws OutOfSharedMemory.
  Lender(const RingLayout& layout, std::uint32_t alive, dlpack::Device device);
  virtual ~Lender() = default;

  Segment& segment() { return segment_; }
  const std::byte* header(std::uint32_t slot) const { return segment_.data() + layout_.header(slot); }

  /// Whether fewer than `alive` slots are lent. Holds until the next loan: slots only come back by themselves.
  bool may_lend();

  /// Makes a filled slot the announced tensor (of at most the slot's bytes); null where it may not.
  /// Throws MessageMismatch if the producer has filled a slot that it does not own.
  LoanPtr lend(std::uint32_t slot, const TensorTemplate& tensor);

  /// Slots lent now.
  std::uint32_t lent();

 protected:
  /// Where a slot's payload lies.
  virtual std::byte* payload(std::uint32_t slot) const = 0;

  /// What must happen before the producer may fill a slot again; false if it must not any more. The lock is held.
  virtual bool release(std::uint32_t slot) noexcept = 0;

  /// Throws MessageMismatch if the producer has filled a slot that it does not own. The lock is held.
  void check_free(std::uint32_t slot) const;

  /// Gives a slot back that was never lent: its payload was copied out. Throws MessageMismatch as `lend`.
  void give_back(std::uint32_t slot);

  LoanPtr hand_over(Loan& loan, std::byte* data, const TensorTemplate& tensor);

  const RingLayout layout_;
  Segment segment_;
  std::mutex mutex_;

 private:
  friend struct GiveBack;

  const std::uint32_t alive_;
  const dlpack::Device device_;
  const int generation_;
  std::vector<Loan> loans_;  // by slot
  IndexQueue free_;
  std::uint32_t lent_ = 0;
  std::vector<bool> is_lent_;  // by slot
};

/// Payloads in shared memory, which the producer may fill again as soon as its slot is back.
class HostLender final : public Lender {
 public:
  HostLender(const RingLayout& layout, std::uint32_t alive) : Lender(layout, alive, {dlpack::kCpu, 0}) {}

  /// A tensor in memory of its own instead of a loan.
  LoanPtr copy_out(std::uint32_t slot, const TensorTemplate& tensor);

 protected:
  std::byte* payload(std::uint32_t slot) const override;
  bool release(std::uint32_t) noexcept override { return true; }
};

}  // namespace pipex
