// A ring whose memory holds what no pipex writes: every call works or throws a named error.
//
//   ring_hostile ATTEMPTS   damages the memory before each attempt; after half of them, also during the rest
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "host/member.hpp"
#include "host/ring.hpp"

namespace {

constexpr pipex::RingSize kSize{256, 2, 2};
constexpr std::size_t kCells = 128;  // a queue's cells stand after its bell (csrc/host/ring_layout.cpp)

pipex::TensorTemplate tensor(std::int64_t floats) {
  pipex::TensorHeader header;
  for (std::size_t i = 0; i < header.size(); ++i) header[i] = static_cast<std::byte>(i);
  return {header, {floats}, {2, 32, 1}};
}

/// Both ends in one run that has ended, so that a wait ends at once.
struct Ring {
  explicit Ring(const std::shared_ptr<pipex::Member>& member)
      : receiver(member, 0, kSize),
        sender(member, 0, receiver.address(), kSize),
        memory(pipex::Segment::open(receiver.address())) {}

  pipex::RingReceiver receiver;
  pipex::RingSender sender;
  pipex::Segment memory;
};

/// Random bytes anywhere, a cell that is nearly right, or one field of a header.
void damage(const pipex::Segment& memory, std::mt19937& random) {
  const pipex::RingLayout layout{kSize.bytes, kSize.slots()};
  const std::uint32_t slot = random() % layout.slots;
  const auto write = [&](std::size_t place, auto value) { std::memcpy(memory.data() + place, &value, sizeof value); };
  switch (random() % 4) {
    case 0:
      return write(random() % (layout.payload(0) - 8), std::uint64_t{random()} << 32 | random());
    case 1:
    case 2: {
      constexpr std::uint32_t kIndices[] = {0, 1, 3, 4, 0x7fffffff, 0xffffffff};
      const std::size_t queue = random() % 2 != 0 ? 0 : layout.free_queue();
      return write(queue + kCells + 8 * slot, std::uint64_t{random() % 4} << 32 | kIndices[random() % 6]);
    }
    default:
      return write(layout.header(slot) + 4 * (random() % 32), static_cast<std::uint32_t>(random()));
  }
}

}  // namespace

int main(int, char** arguments) {
  const int attempts = std::atoi(arguments[1]);
  const auto control = pipex::Control::create(1);
  const auto member = std::make_shared<pipex::Member>(control, 0, std::chrono::seconds(20), false, [] {});
  control->record(0, pipex::Ending::failed, 0, "so that waits end at once");
  const pipex::TensorTemplate right = tensor(64), large = tensor(1 << 20);
  std::vector<std::byte> data(large.bytes);

  std::mt19937 random;
  std::map<std::string, int> outcomes;
  std::unique_ptr<Ring> ring;
  std::vector<pipex::LoanPtr> held;
  std::atomic<bool> stop{false};
  std::thread scribbler;
  const auto quiet = [&] {
    stop = true;
    if (scribbler.joinable()) scribbler.join();
    stop = false;
  };
  for (int attempt = 0; attempt < attempts; ++attempt) {
    if (attempt % 10 == 0) {
      quiet();
      ring = std::make_unique<Ring>(member);  // what is held outlives its ring
      if (attempt >= attempts / 2) {
        scribbler = std::thread([&stop, memory = &ring->memory, seed = random()] {
          std::mt19937 own(seed);
          while (!stop) damage(*memory, own);
        });
      }
    }
    damage(ring->memory, random);
    try {
      if (random() % 2 != 0) ring->sender.send(random() % 8 != 0 ? right : large, data.data(), 1, 0);
      held.push_back(ring->receiver.receive(right, 1, 0));
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
