// One ring between threads: a producer, a consumer, and one that gives back what the consumer has received.
//
//   ring_stress MESSAGES BYTES   sends so many messages of at most so many bytes; prints how many bytes arrived
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "host/member.hpp"
#include "host/ring.hpp"

namespace {

using pipex::LoanPtr;

constexpr std::uint32_t kUnderWay = 2, kAlive = 3;
constexpr std::size_t kOffsets = 4096;  // a message begins at one of so many places of the pattern

/// What message `number` is: both sides know it without asking each other.
struct Message {
  Message(std::uint64_t number, std::size_t most) {
    std::minstd_rand random(static_cast<std::uint32_t>(number + 1));
    bytes = 1 + random() % most;
    offset = random() % kOffsets;
  }

  pipex::TensorTemplate tensor() const {
    pipex::TensorHeader header{};
    std::memcpy(header.data() + 56, &bytes, sizeof bytes);
    return {header, {static_cast<std::int64_t>(bytes)}, {1, 8, 1}};
  }

  std::size_t bytes, offset;
};

/// Received messages on their way to the thread that gives them back.
class Received {
 public:
  void put(LoanPtr loan, const std::byte* expected) {
    const std::lock_guard<std::mutex> lock(mutex_);
    loans_.emplace_back(std::move(loan), expected);
    changed_.notify_one();
  }

  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    changed_.notify_one();
  }

  /// Any of them, compared once more just before it is given back.
  void give_back_all() {
    std::minstd_rand random;
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return closed_ || !loans_.empty(); });
      if (loans_.empty()) return;
      std::swap(loans_[random() % loans_.size()], loans_.back());
      auto [loan, expected] = std::move(loans_.back());
      loans_.pop_back();
      lock.unlock();
      compare(*loan, expected);
    }
  }

  static void compare(const pipex::Loan& loan, const std::byte* expected) {
    if (std::memcmp(loan.managed.tensor.data, expected, static_cast<std::size_t>(loan.shape[0])) == 0) return;
    std::fprintf(stderr, "a message of %ld bytes is damaged\n", static_cast<long>(loan.shape[0]));
    std::exit(1);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<LoanPtr, const std::byte*>> loans_;
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
  const pipex::RingSize size{most, kUnderWay, kAlive};
  pipex::RingReceiver receiver(consumer, 0, size);
  pipex::RingSender sender(producer, 1, receiver.address(), size);

  Received received;
  std::thread sending([&] {
    for (std::uint64_t number = 0; number < messages; ++number) {
      const Message message(number, most);
      sender.send(message.tensor(), pattern.data() + message.offset, number, static_cast<std::uint32_t>(number));
    }
  });
  std::thread giving_back([&] { received.give_back_all(); });
  std::uint64_t total = 0;
  for (std::uint64_t number = 0; number < messages; ++number) {
    const Message message(number, most);
    LoanPtr loan = receiver.receive(message.tensor(), number, static_cast<std::uint32_t>(number));
    const std::byte* expected = pattern.data() + message.offset;
    Received::compare(*loan, expected);
    total += message.bytes;
    received.put(std::move(loan), expected);
  }
  received.close();
  sending.join();
  giving_back.join();
  producer->leave();
  consumer->leave();
  std::printf("%llu\n", static_cast<unsigned long long>(total));
  return receiver.lent() == 0 ? 0 : 1;
}
