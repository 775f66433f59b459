#include "host/ring_layout.hpp"

#include <string>

namespace pipex {
namespace {

constexpr std::size_t kLine = 128;  // two cache lines: the hardware fetches them in pairs
constexpr std::size_t kCell = 64;

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

std::size_t queue_bytes(std::uint32_t cells) { return kLine + round_up(cells * sizeof(std::uint64_t), kLine); }

}  // namespace

std::size_t RingLayout::free_queue() const { return queue_bytes(slots); }

std::size_t RingLayout::cell(std::uint32_t slot) const { return 2 * queue_bytes(slots) + slot * kCell; }

IndexQueue::IndexQueue(std::byte* place, std::uint32_t cells)
    : bell_(reinterpret_cast<Doorbell*>(place)),
      cells_(reinterpret_cast<std::atomic<std::uint64_t>*>(place + kLine)),
      count_(cells) {}

void IndexQueue::advance() {
  if (++next_ < count_) return;
  next_ = 0;
  ++lap_;
}

void IndexQueue::push(std::uint32_t index) {
  cells_[next_].store(std::uint64_t{lap_} << 32 | index);  // seq_cst, as the bell demands
  advance();
  bell_->ring();
}

std::optional<std::uint32_t> IndexQueue::peek() const {
  const std::uint64_t cell = cells_[next_].load();
  const auto lap = static_cast<std::uint32_t>(cell >> 32);
  const auto index = static_cast<std::uint32_t>(cell);
  if (lap == lap_ && index < count_) return index;
  if (lap == lap_ - 1) return std::nullopt;
  throw corrupt_ring("slot " + std::to_string(index) + " in lap " + std::to_string(lap),
                     "a slot below " + std::to_string(count_) + " in lap " + std::to_string(lap_));
}

NamedError corrupt_ring(const std::string& got, const std::string& needed) {
  return {"MessageMismatch", "the buffers between two ranks hold what pipex never writes", got, needed,
          "use one version of pipex on all ranks; if it is one, some code writes out of bounds"};
}

}  // namespace pipex
