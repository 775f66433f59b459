// Two ranks, as threads of one process, send each other messages through device rings; a third and a fourth thread give
// back what they have received.
//
//   device_stress LIBRARY LIBRARY MESSAGES WORDS [END]
//
// LIBRARY is a copy of the simulated driver for each rank. A message has up to so many words of 8 bytes. At message END
// rank 1 fails, once streams of rank 0 wait for it. Prints how many messages were lent, how many were copied out, and
// how many ranks saw the run end before its time.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "device/rank.hpp"
#include "device/ring.hpp"

namespace {

using namespace pipex::device;
using pipex::LoanPtr;

constexpr std::uint32_t kUnderWay = 2, kAlive = 2;
constexpr std::uint64_t kSources = 3;    // that a rank fills in turn
constexpr std::uint64_t kScribble = ~1;  // what a slot holds once it is given back

struct Traffic {
  std::uint64_t messages;
  std::size_t words;
  std::uint64_t end;
};

/// The functions of one rank's driver that are the simulator's own.
class Simulator {
 public:
  explicit Simulator(const char* path) : path(path), handle_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ != nullptr) return;
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(1);
  }

  template <typename Function>
  Function* find(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(handle_, name));
  }

  const std::string path;

 private:
  void* const handle_;

 public:
  using Kernel = Result(StreamHandle, DevicePointer, std::size_t, std::uint64_t);
  Kernel* const fill = find<Kernel>("simulated_fill");
  Kernel* const check = find<Kernel>("simulated_check");
  using Hold = Result(StreamHandle, DevicePointer, std::uint64_t);
  Hold* const hold = find<Hold>("simulated_hold");
  std::uint64_t (*const mismatches)() = find<std::uint64_t()>("simulated_mismatches");
  std::size_t (*const mappings)() = find<std::size_t()>("simulated_mappings");
  std::size_t (*const violations)(char*, std::size_t) = find<std::size_t(char*, std::size_t)>("simulated_violations");
  void (*const stop)() = find<void()>("simulated_stop");
};

/// A message of `rank`: both sides know it without asking each other.
struct Message {
  Message(int rank, std::uint64_t number, std::size_t most) : tag(2 * number + rank) {
    std::minstd_rand random(static_cast<std::uint32_t>(tag + 1));
    words = random() % (most + 1);
  }

  pipex::TensorTemplate tensor() const {
    pipex::TensorHeader header{};
    std::memcpy(header.data() + 56, &words, sizeof words);
    return {header, {static_cast<std::int64_t>(words)}, {0, 64, 1}};
  }

  std::uint64_t tag;
  std::size_t words;
};

/// Received messages on their way to the thread that gives them back.
class Received {
 public:
  void put(LoanPtr loan, const Message& message) {
    const std::lock_guard lock(mutex_);
    loans_.emplace_back(std::move(loan), message);
    changed_.notify_one();
  }

  /// A message was copied out, since all that may be lent are kept here.
  void one_too_many() {
    const std::lock_guard lock(mutex_);
    hurry_ = true;
    changed_.notify_one();
  }

  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_one();
  }

  /// Any of them, some after a while; read once more just before, and spoilt.
  void give_back_all(const Simulator& simulator, StreamHandle compute) {
    std::minstd_rand random;
    for (;;) {
      std::unique_lock lock(mutex_);
      const std::size_t kept = random() % (kAlive + 1);
      changed_.wait(lock, [&] { return closed_ || loans_.size() > kept || (hurry_ && !loans_.empty()); });
      if (loans_.empty()) return;
      hurry_ = false;
      std::swap(loans_[random() % loans_.size()], loans_.back());
      auto [loan, message] = std::move(loans_.back());
      loans_.pop_back();
      lock.unlock();
      const auto data = reinterpret_cast<DevicePointer>(loan->managed.tensor.data);
      simulator.check(compute, data, message.words, message.tag);
      simulator.fill(compute, data, message.words, kScribble);
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::pair<LoanPtr, Message>> loans_;
  bool closed_ = false, hurry_ = false;
};

/// The whole life of a rank.
class Life {
 public:
  Life(const Simulator& simulator, const std::shared_ptr<pipex::Control>& control, int number, const Traffic& traffic)
      : simulator_(simulator),
        traffic_(traffic),
        number_(number),
        peer_(1 - number),
        member_(std::make_shared<pipex::Member>(control, number, std::chrono::seconds(60), false, [] {})),
        rank_(std::make_shared<Rank>(member_, simulator.path, 0, pipex::dlpack::Device{pipex::dlpack::kCpu, 0})),
        compute_(rank_->gpu(), Urgency::compute) {}

  void run() {
    const Current current(*rank_->gpu());
    for (DevicePointer& source : sources_) source = allocate();
    own_ = allocate();
    gate_ = allocate();
    {
      const pipex::RingSize size{8 * traffic_.words, kUnderWay, kAlive};
      RingSender sender(rank_, peer_, size);
      RingReceiver receiver(rank_, peer_, size);
      connect(sender, receiver);
      std::thread giving_back([&] { received_.give_back_all(simulator_, compute_.get()); });
      try {
        for (std::uint64_t number = 0; number < traffic_.messages; ++number) {
          if (number_ == 1 && number == traffic_.end) fail(sender, number);
          send(sender, number);
          receive(receiver, number);
        }
        rank_->flush();
      } catch (const pipex::Aborted&) {
        aborted = true;
      }
      sender.close();
      meet();  // what is given back from here on is written to memory that its owner has closed, but not freed
      received_.close();
      giving_back.join();
      receiver.close();
      meet();
      rank_->free_retired();
    }
    compute_.synchronize();
    for (const DevicePointer source : sources_) rank_->driver().free(source);
    rank_->driver().free(own_);
    rank_->driver().free(gate_);
    rank_->close();
    meet();
    member_->leave();
  }

  std::uint64_t lent = 0, copied = 0;
  bool aborted = false;

 private:
  DevicePointer allocate() const {
    DevicePointer pointer = 0;
    rank_->driver().check(rank_->driver().allocate(&pointer, std::max<std::size_t>(8, 8 * traffic_.words)), "allocate");
    return pointer;
  }

  void connect(RingSender& sender, RingReceiver& receiver) {
    struct {
      pipex::Address address;
      MemoryOffer slots, released;
    } offer{receiver.address(), receiver.offer(), sender.offer()};
    const std::string theirs = member_->exchange({reinterpret_cast<const char*>(&offer), sizeof offer})[peer_];
    std::memcpy(&offer, theirs.data(), sizeof offer);
    sender.connect(offer.address, offer.slots);
    receiver.connect(offer.released);
  }

  /// Waits for the peer, if there is still a run.
  void meet() {
    if (!aborted) member_->exchange("");
  }

  void send(RingSender& sender, std::uint64_t number) {
    while (rank_->sent() + kSources <= number) {  // without a spin, which is most of the time under a sanitizer
      member_->control().raise_if_aborted();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    const Message message(number_, number, traffic_.words);
    const DevicePointer source = sources_[number % kSources];
    simulator_.fill(compute_.get(), source, message.words, message.tag);
    sender.send(message.tensor(), source, compute_.get(), 1, static_cast<std::uint32_t>(number));
  }

  void receive(RingReceiver& receiver, std::uint64_t number) {
    const Message message(peer_, number, traffic_.words);
    const auto tensor = message.tensor();
    const auto microbatch = static_cast<std::uint32_t>(number);
    if (LoanPtr loan = receiver.receive(tensor, compute_.get(), 1, microbatch)) {
      const auto data = reinterpret_cast<DevicePointer>(loan->managed.tensor.data);
      simulator_.check(compute_.get(), data, message.words, message.tag);
      received_.put(std::move(loan), message);
      ++lent;
    } else {
      receiver.receive_into(tensor, own_, compute_.get(), 1, microbatch);
      simulator_.check(compute_.get(), own_, message.words, message.tag);
      received_.one_too_many();
      ++copied;
    }
  }

  /// Announces a message that its streams do not send, and fails once a stream of the peer waits for it.
  void fail(RingSender& sender, std::uint64_t number) {
    simulator_.hold(compute_.get(), gate_, 1);
    send(sender, number);
    pipex::Control& control = member_->control();
    while (control.part(peer_).device_waiting_on.load() != number_ + 1) std::this_thread::yield();
    control.record(number_, pipex::Ending::failed, number_, "as asked");
    std::atomic_ref(*reinterpret_cast<std::uint64_t*>(gate_)).store(1);
    control.raise_if_aborted();
  }

  const Simulator& simulator_;
  const Traffic traffic_;
  const int number_, peer_;
  const std::shared_ptr<pipex::Member> member_;
  const std::shared_ptr<Rank> rank_;
  const Stream compute_;
  DevicePointer sources_[kSources], own_ = 0, gate_ = 0;
  Received received_;
};

}  // namespace

int main(int count, char** arguments) {
  const Simulator simulators[] = {Simulator(arguments[1]), Simulator(arguments[2])};
  const std::uint64_t messages = std::strtoull(arguments[3], nullptr, 10);
  const bool ends = count > 5;
  const Traffic traffic{messages, std::strtoull(arguments[4], nullptr, 10),
                        ends ? std::strtoull(arguments[5], nullptr, 10) : messages};
  const auto control = pipex::Control::create(2);
  std::atomic<std::uint64_t> lent = 0, copied = 0;
  std::atomic<int> aborted = 0;
  const auto live = [&](int number) {
    Life life(simulators[number], control, number, traffic);
    life.run();
    lent += life.lent;
    copied += life.copied;
    aborted += life.aborted;
  };
  std::thread first(live, 0), second(live, 1);
  first.join();
  second.join();

  std::uint64_t wrong = 0;
  for (const Simulator& simulator : simulators) {
    char text[4096];
    simulator.stop();
    wrong += simulator.violations(text, sizeof text);
    std::fputs(text, stderr);
    if (!ends)
      wrong += simulator.mismatches() + simulator.mappings();  // of an ended run memory stays, and means nothing
  }
  std::printf("%llu %llu %d\n", static_cast<unsigned long long>(lent), static_cast<unsigned long long>(copied),
              aborted.load());
  if (wrong != 0) std::fprintf(stderr, "%llu wrong words or mappings left\n", static_cast<unsigned long long>(wrong));
  return wrong == 0 ? 0 : 1;
}
