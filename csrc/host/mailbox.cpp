#include "host/mailbox.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "host/copy.hpp"

namespace pipex {
Outbox::Outbox(std::shared_ptr<Member> member, int peer, const Address& address, const RingSize& size,
               const MessageHeader& edge)
    : member_(std::move(member)),
      peer_(peer),
      layout_{size.slots()},
      ring_(Segment::open(address)),
      ready_(ring_.data(), layout_.slots),
      free_(ring_.data() + layout_.free_queue(), layout_.slots),
      away_(layout_.slots, false),
      memories_(layout_.slots),
      header_(edge) {
  if (ring_.size() != layout_.total())
    throw NamedError("InputError", "rank " + std::to_string(peer) + " offers buffers of another size",
                     std::to_string(ring_.size()) + " bytes", std::to_string(layout_.total()),
                     "use one version of pipex on all ranks");
  ring_.close_descriptor();
  unopened_.reserve(layout_.slots);
  for (std::uint32_t slot = layout_.slots; slot > 0; --slot) stack_.push_back(slot - 1);
}

/// Moves all returned slots to the stack; says whether there is any to take.
bool Outbox::collect() {
  while (const auto slot = free_.peek()) {
    if (!away_[*slot]) throw corrupt_ring("slot " + std::to_string(*slot) + " returned twice", "once");
    away_[*slot] = false;
    stack_.push_back(*slot);
    free_.pop();
  }
  return !stack_.empty();
}

std::uint32_t Outbox::take() {
  if (!collect()) member_->wait(free_.bell(), peer_, [this] { return collect(); });
  const std::uint32_t slot = stack_.back();
  stack_.pop_back();
  away_[slot] = true;
  return slot;
}

std::byte* Outbox::memory(std::uint32_t slot, std::size_t bytes) {
  if (!unopened_.empty()) close_descriptors();
  std::optional<Segment>& memory = memories_[slot];
  if (memory && memory->size() >= bytes) return memory->data();
  try {
    Segment made = make(bytes);
    const Address address = made.address();
    if (memory) bytes_ -= memory->size();
    std::erase(unopened_, slot);
    memory.emplace(std::move(made));  // the consumer has let go of the slot, and maps the new one next
    cell(slot).address = address;
  } catch (...) {
    away_[slot] = false;  // not taken after all
    stack_.push_back(slot);
    throw;
  }
  if (bytes > room_ && room_ > 0) ++grown_;
  room_ = std::max(room_, memory->size());
  bytes_ += memory->size();
  cell(slot).generation.fetch_add(1);
  unopened_.push_back(slot);
  return memory->data();
}

/// With as much room as the other slots', or half more, so that ever longer messages do not make new memory each time;
/// with no more than `bytes` where there is none for that.
Segment Outbox::make(std::size_t bytes) const {
  const std::size_t room = bytes > room_ ? std::max(bytes, room_ + room_ / 2) : room_;
  try {
    return Segment::create(room);
  } catch (const NamedError& error) {
    if (std::string_view(error.python_class) != "OutOfSharedMemory" || room == bytes) throw;
  }
  return Segment::create(bytes);
}

void Outbox::close_descriptors() {
  std::erase_if(unopened_, [this](std::uint32_t slot) {
    if (cell(slot).opened.load() != cell(slot).generation.load()) return false;
    memories_[slot]->close_descriptor();
    return true;
  });
}

void Outbox::send(const MessageForm& form, const std::vector<std::uintptr_t>& tensors, std::uint64_t step,
                  std::uint32_t microbatch) {
  const std::uint32_t slot = take();
  std::byte* const payload = memory(slot, form.total()) + form.payload();
  for (std::size_t i = 0; i < form.count(); ++i)
    if (form.span(i) > 0)
      copy_message(payload + form.tensor(i).offset, reinterpret_cast<const std::byte*>(tensors[i]), form.span(i));
  publish(slot, form, kInSlot, step, microbatch);
}

void Outbox::publish(std::uint32_t slot, const MessageForm& form, std::uint8_t place, std::uint64_t step,
                     std::uint32_t microbatch) {
  header_.place = place;
  header_.count = static_cast<std::uint16_t>(form.count());
  header_.microbatch = microbatch;
  header_.step = step;
  header_.bytes = form.payload_bytes();
  std::byte* const message = memories_[slot]->data();
  std::memcpy(message, &header_, sizeof header_);
  // Most messages have the form of the one before in the slot: what is not written stays in the consumer's cache.
  if (std::memcmp(message + sizeof header_, form.table().data(), form.table().size()) != 0)
    std::memcpy(message + sizeof header_, form.table().data(), form.table().size());
  ready_.push(slot);
  ++header_.sequence;
}

Inbox::Inbox(std::shared_ptr<Member> member, int peer, Lender& lender, const MessageHeader& edge)
    : member_(std::move(member)),
      peer_(peer),
      lender_(lender),
      ready_(lender.ring().data(), lender.layout().slots),
      needed_(edge) {}

std::uint32_t Inbox::front(std::uint64_t step, std::uint32_t microbatch) {
  auto slot = ready_.peek();
  if (!slot) member_->wait(ready_.bell(), peer_, [&] { return (slot = ready_.peek()).has_value(); });
  needed_.step = step;
  needed_.microbatch = microbatch;
  read(*slot);
  return *slot;
}

/// A slot's memory is mapped when its message is read, and may have gone with its producer by then.
const Segment& Inbox::memory(std::uint32_t slot) const {
  try {
    return lender_.memory(slot);
  } catch (const NamedError& error) {
    if (std::string_view(error.python_class) == "InputError") member_->raise_if_ending();
    throw;
  }
}

/// Everything is copied before it is looked at: the memory is shared.
void Inbox::read(std::uint32_t slot) {
  const Segment& memory = this->memory(slot);
  const auto impossible = [](std::uint64_t bytes, const std::string& needed) {
    return corrupt_ring("a message of " + std::to_string(bytes) + " bytes", needed);
  };
  MessageHeader got;
  if (memory.size() < sizeof got) throw impossible(memory.size(), "its header");
  std::memcpy(&got, memory.data(), sizeof got);
  MessageHeader needed = needed_;
  needed.place = got.place;
  needed.count = got.count;
  needed.bytes = got.bytes;
  if (std::memcmp(&got, &needed, sizeof got) != 0) throw HeaderMismatch(got, needed);
  const std::size_t payload = MessageForm::payload_of(got.count);
  if (got.count > kMaxTensors || payload > memory.size() ||
      (got.place == kInSlot && got.bytes > memory.size() - payload))
    throw impossible(got.bytes, "one within its slot");
  place_ = got.place;
  table_.assign(reinterpret_cast<const char*>(memory.data() + sizeof got), got.count * sizeof(TensorRecord));
  if (form_ && form_->payload_bytes() == got.bytes && form_->table() == table_) return;
  form_.emplace(table_, got.bytes);
  new_form_ = true;
}

void Inbox::pop() {
  ready_.pop();
  ++needed_.sequence;
}

}  // namespace pipex
