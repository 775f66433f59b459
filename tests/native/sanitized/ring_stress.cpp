// One ring between threads: a producer, a consumer, and one that gives back what the consumer has received.
//
//   ring_stress MESSAGES BYTES   sends so many messages of up to three tensors, each of at most so many bytes, on the
//   way
//                                ever larger ones with smaller ones between them; prints how many bytes arrived, and
//                                how often the ring has grown
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "forms.hpp"
#include "host/member.hpp"
#include "host/ring.hpp"

namespace {

constexpr std::uint32_t kUnderWay = 2, kAlive = 3;
constexpr std::size_t kOffsets = 4096;  // a tensor begins at one of so many places of the pattern

/// What message `number` is: both sides know it without asking each other.
struct Message {
  Message(std::uint64_t number, std::uint64_t messages, std::size_t most) {
    std::minstd_rand random(static_cast<std::uint32_t>(number + 1));
    random.discard(2);
    const std::size_t now = most * std::min(messages, 2 * number + 1) / messages;
    for (std::size_t left = random() % 4; left > 0; --left) {
      bytes.push_back(random() % (now + 1));
      offsets.push_back(random() % kOffsets);
    }
  }

  std::vector<std::size_t> bytes, offsets;
};

/// A received message, and what its tensors should hold.
struct Kept {
  Kept(pipex::Received received, const Message& message, const std::byte* pattern)
      : received(std::move(received)), message(message), pattern(pattern) {}

  void compare() const {
    bool same = received.count() == message.bytes.size();
    for (std::size_t i = 0; same && i < received.count(); ++i) {
      const auto& tensor = received[i].managed.tensor;
      same = received[i].shape[0] == static_cast<std::int64_t>(message.bytes[i]) &&
             std::memcmp(tensor.data, pattern + message.offsets[i], message.bytes[i]) == 0;
    }
    if (same) return;
    std::fprintf(stderr, "a message of %zu tensors is damaged\n", message.bytes.size());
    std::_Exit(1);
  }

  pipex::Received received;
  Message message;
  const std::byte* pattern;
};

/// Received messages on their way to the thread that gives them back.
class Received {
 public:
  void put(Kept kept) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(std::move(kept));
    changed_.notify_one();
  }

  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    changed_.notify_one();
  }

  /// Any of them, compared once more just before it is given back, as a whole or tensor by tensor.
  void give_back_all() {
    std::minstd_rand random;
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return closed_ || !kept_.empty(); });
      if (kept_.empty()) return;
      std::swap(kept_[random() % kept_.size()], kept_.back());
      Kept kept = std::move(kept_.back());
      kept_.pop_back();
      lock.unlock();
      kept.compare();
      if (random() % 2 == 0) continue;
      for (std::size_t left = kept.message.bytes.size(); left > 0; --left) {
        pipex::dlpack::ManagedTensor* const tensor = kept.received.release();
        tensor->deleter(tensor);
      }
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Kept> kept_;
  bool closed_ = false;
};

}  // namespace

int main(int, char** arguments) {
  const std::uint64_t messages = std::strtoull(arguments[1], nullptr, 10);
  const std::size_t most = std::strtoull(arguments[2], nullptr, 10);
  std::vector<std::byte> pattern(most + kOffsets);
  std::mt19937 random;
  for (std::byte& byte : pattern) byte = static_cast<std::byte>(random());

  const auto control = pipex::Control::create(2);
  const auto join = [&](int rank) {
    return std::make_shared<pipex::Member>(control, rank, std::chrono::seconds(60), false, [] {});
  };
  const auto producer = join(0), consumer = join(1);
  const pipex::RingSize size{kUnderWay, kAlive};
  pipex::RingReceiver receiver(consumer, 0, size, {});
  pipex::Outbox sender(producer, 1, receiver.address(), size, {});

  Received received;
  std::thread sending([&] {
    for (std::uint64_t number = 0; number < messages; ++number) {
      const Message message(number, messages, most);
      std::vector<std::uintptr_t> tensors;
      for (const std::size_t offset : message.offsets)
        tensors.push_back(reinterpret_cast<std::uintptr_t>(pattern.data() + offset));
      sender.send(form_of(message.bytes, 1), tensors, number, static_cast<std::uint32_t>(number));
    }
  });
  std::thread giving_back([&] { received.give_back_all(); });
  std::uint64_t total = 0;
  for (std::uint64_t number = 0; number < messages; ++number) {
    const pipex::MessageForm* form = nullptr;
    Kept kept(receiver.receive(number, static_cast<std::uint32_t>(number), form), Message(number, messages, most),
              pattern.data());
    kept.compare();
    for (const std::size_t bytes : kept.message.bytes) total += bytes;
    received.put(std::move(kept));
  }
  received.close();
  sending.join();
  giving_back.join();
  producer->leave();
  consumer->leave();
  std::printf("%llu %llu\n", static_cast<unsigned long long>(total), static_cast<unsigned long long>(sender.grown()));
  return receiver.lent() == 0 ? 0 : 1;
}
