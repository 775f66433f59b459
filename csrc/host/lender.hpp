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
  Lender(const RingLayout& layout, std::uint32_t alive);

  Segment& segment() { return segment_; }
  const std::byte* header(std::uint32_t slot) const { return segment_.data() + layout_.header(slot); }

  /// Makes a filled slot the announced tensor (of at most the slot's bytes); beyond `alive`, a copy of it.
  /// Throws MessageMismatch if the producer has filled a slot that it does not own.
  LoanPtr lend(std::uint32_t slot, const TensorTemplate& tensor);

  /// Slots lent now.
  std::uint32_t lent();

 private:
  friend struct GiveBack;

  LoanPtr copy_out(std::uint32_t slot, const TensorTemplate& tensor);
  LoanPtr hand_over(Loan& loan, std::byte* data, const TensorTemplate& tensor);

  const RingLayout layout_;
  const std::uint32_t alive_;
  const int generation_;
  Segment segment_;
  std::vector<Loan> loans_;  // by slot

  std::mutex mutex_;
  IndexQueue free_;
  std::uint32_t lent_ = 0;
  std::vector<bool> is_lent_;  // by slot
};

}  // namespace pipex
