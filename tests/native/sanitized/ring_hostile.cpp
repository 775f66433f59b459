// A ring whose memory holds what no pipex writes: every call works or throws a named error, and what arrives lies
// within memory.
//
//   ring_hostile ATTEMPTS   damages the memory before each send and receive; after half of them, also during the rest
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "forms.hpp"
#include "host/member.hpp"
#include "host/ring.hpp"

namespace {

constexpr pipex::RingSize kSize{2, 2};
constexpr std::size_t kCells = 128;  // a queue's cells stand after its bell (csrc/host/ring_layout.cpp)
constexpr std::size_t kSmall = 64, kLarge = 1 << 16;
constexpr std::uint64_t kEdges[] = {0,  1,   2,        7,          8,          9,          63,   64,
                                    65, 255, 1u << 31, 0xffffffff, 1ull << 62, 1ull << 63, ~0ull};

pipex::MessageHeader edge() {
  pipex::MessageHeader header{};
  for (std::size_t i = 0; i < header.edge.size(); ++i) header.edge[i] = static_cast<std::byte>(i);
  return header;
}

/// Both ends in one run that has ended, so that a wait ends at once.
struct Ring {
  explicit Ring(const std::shared_ptr<pipex::Member>& member)
      : receiver(member, 0, kSize, edge()),
        sender(member, 0, receiver.address(), kSize, edge()),
        memory(pipex::Segment::open(receiver.address())) {
    std::vector<pipex::Received> held;
    const std::vector<std::byte> data(kSmall);
    const std::uintptr_t tensor = reinterpret_cast<std::uintptr_t>(data.data());
    const pipex::MessageForm* form;
    for (std::uint32_t slot = 0; slot < kSize.slots(); ++slot) {  // LIFO: every slot gets its memory
      sender.send(form_of({kSmall, kSmall}, 1), {tensor, tensor}, 1, 0);
    }
    for (std::uint32_t slot = 0; slot < kSize.slots(); ++slot) {
      slots.push_back(pipex::Segment::open(
          reinterpret_cast<pipex::SlotCell*>(memory.data() + pipex::RingLayout{kSize.slots()}.cell(slot))->address));
      held.push_back(receiver.receive(1, 0, form));
    }
  }

  pipex::RingReceiver receiver;
  pipex::Outbox sender;
  pipex::Segment memory;
  std::vector<pipex::Segment> slots;  // as they were at first
};

/// A few bytes of a row, nearly right or not at all.
void damage_row(std::byte* row, std::mt19937& random) {
  const std::uint64_t value = random() % 2 != 0 ? kEdges[random() % std::size(kEdges)] : random();
  const std::size_t bytes = random() % 2 != 0 ? 1 : 8;
  const std::size_t place = random() % 2 != 0 ? random() % 16 : 8 + 8 * (random() % 17);
  std::memcpy(row + place, &value, bytes);
}

/// Random bytes anywhere, a cell that is nearly right, a slot's place, or something of a header or table.
void damage(const Ring& ring, std::mt19937& random) {
  const pipex::RingLayout layout{kSize.slots()};
  const std::uint32_t slot = random() % layout.slots;
  const auto write = [](const pipex::Segment& memory, std::size_t place, auto value) {
    std::memcpy(memory.data() + place, &value, sizeof value);
  };
  switch (random() % 8) {
    case 0:
      return write(ring.memory, random() % (layout.total() - 8), std::uint64_t{random()} << 32 | random());
    case 1:
    case 2: {
      constexpr std::uint32_t kIndices[] = {0, 1, 3, 4, 0x7fffffff, 0xffffffff};
      const std::size_t queue = random() % 2 != 0 ? 0 : layout.free_queue();
      return write(ring.memory, queue + kCells + 8 * slot, std::uint64_t{random() % 4} << 32 | kIndices[random() % 6]);
    }
    case 3:
      return write(ring.memory, layout.cell(slot) + 8 * (random() % 6), kEdges[random() % std::size(kEdges)]);
    case 4:
    case 5:
      return write(ring.slots[slot], 4 * (random() % 16), static_cast<std::uint32_t>(kEdges[random() % 10]));
    default:
      return damage_row(ring.slots[slot].data() + 64 + 144 * (random() % 2), random);
  }
}

/// Reads and writes the ends of all tensors: a sanitizer sees whether they lie within memory.
void touch(const pipex::Received& received, const pipex::MessageForm& form) {
  for (std::size_t i = 0; i < received.count(); ++i) {
    auto* const data = static_cast<volatile char*>(received[i].managed.tensor.data);
    if (form.span(i) == 0) continue;
    data[0] = data[form.span(i) - 1];
    data[form.span(i) - 1] = data[0];
  }
}

/// Whether a table that was accepted is one, by arithmetic that cannot overflow.
bool is_sound(const pipex::MessageForm& form, std::uint64_t payload_bytes) {
  using Wide = unsigned __int128;
  const auto below = [](Wide a, Wide b, Wide most) { return a == 0 || b <= most / a; };
  constexpr Wide kMost = ~Wide{0} >> 2;
  for (std::size_t i = 0; i < form.count(); ++i) {
    const pipex::TensorRecord& record = form.tensor(i);
    Wide last = 0, elements = 1;
    bool empty = false;
    for (int d = 0; d < record.dimensions; ++d) {
      empty = empty || record.shape[d] == 0;
      if (record.shape[d] == 0) continue;
      if (!below(elements, static_cast<Wide>(record.shape[d]), Wide{1} << 63)) return false;
      elements *= static_cast<Wide>(record.shape[d]);
      const Wide steps = static_cast<Wide>(record.shape[d] - 1), stride = static_cast<Wide>(record.strides[d]);
      if (record.shape[d] < 0 || record.strides[d] < 0 || !below(steps, stride, kMost)) return false;
      last += steps * stride;
    }
    const Wide span = empty ? 0 : (last + 1) * (record.bits / 8);
    if (span != form.span(i) || record.offset + span > payload_bytes) return false;
  }
  return true;
}

/// A table with damage is refused by name or sound.
void try_table(std::mt19937& random, std::map<std::string, int>& outcomes) {
  auto [table, payload_bytes] = table_of({kSmall, kSmall, 1}, 4);
  for (std::uint32_t left = 1 + random() % 3; left > 0; --left)
    damage_row(reinterpret_cast<std::byte*>(table.data()) + 144 * (random() % 3), random);
  if (random() % 8 == 0) table.resize(random() % 600);
  try {
    const pipex::MessageForm form(table, payload_bytes);
    if (!is_sound(form, payload_bytes)) std::abort();
    ++outcomes["table:taken"];
  } catch (const pipex::NamedError& error) {
    ++outcomes["table:" + std::string(error.python_class)];
  }
}

}  // namespace

int main(int, char** arguments) {
  const int attempts = std::atoi(arguments[1]);
  const auto control = pipex::Control::create(1);
  const auto member = std::make_shared<pipex::Member>(control, 0, std::chrono::seconds(20), false, [] {});
  control->record(0, pipex::Ending::failed, 0, "so that waits end at once");
  const pipex::MessageForm small = form_of({kSmall, kSmall}, 1), large = form_of({kLarge}, 1);
  std::vector<std::byte> data(kLarge);
  const std::uintptr_t tensor = reinterpret_cast<std::uintptr_t>(data.data());

  std::mt19937 random;
  std::map<std::string, int> outcomes;
  std::unique_ptr<Ring> ring;
  std::vector<pipex::Received> held;
  std::atomic<bool> stop{false};
  std::thread scribbler;
  const auto quiet = [&] {
    stop = true;
    if (scribbler.joinable()) scribbler.join();
    stop = false;
  };
  for (int attempt = 0; attempt < attempts; ++attempt) {
    try_table(random, outcomes);
    if (attempt % 10 == 0) {
      quiet();
      ring = std::make_unique<Ring>(member);  // what is held outlives its ring
      if (attempt >= attempts / 2) {
        scribbler = std::thread([&stop, victim = ring.get(), seed = random()] {
          std::mt19937 own(seed);
          while (!stop) damage(*victim, own);
        });
      }
    }
    damage(*ring, random);
    try {
      if (random() % 8 == 0)
        ring->sender.send(large, {tensor}, 1, 0);
      else if (random() % 2 != 0)
        ring->sender.send(small, {tensor, tensor}, 1, 0);
      damage(*ring, random);
      const pipex::MessageForm* news = nullptr;
      pipex::Received received = ring->receiver.receive(1, 0, news);
      touch(received, ring->receiver.form());
      held.push_back(std::move(received));
      ++outcomes["received"];
    } catch (const pipex::HeaderMismatch&) {
      ++outcomes["HeaderMismatch"];
    } catch (const pipex::NamedError& error) {
      ++outcomes[error.python_class];
    } catch (const pipex::Aborted&) {
      ++outcomes["Aborted"];
    }
    if (random() % 3 == 0 && !held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      held.pop_back();
    }
  }
  quiet();
  held.clear();
  for (const auto& [outcome, times] : outcomes) std::printf("%s %d\n", outcome.c_str(), times);
  return 0;
}
