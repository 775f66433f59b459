// Two ranks, as threads of one process, send each other messages through device rings; a third and a fourth thread give
// back what they have received.
//
//   device_stress LIBRARY LIBRARY MESSAGES WORDS [END]
//
// LIBRARY is a copy of the simulated driver for each rank. A message has up to three tensors, each of up to so many
// words of 8 bytes, on the way ever larger ones with smaller ones between them. At message END rank 1 fails, once
// streams of rank 0 wait for it; then the rings have grown before the first message. Prints how many messages were
// lent, how many were copied out, how many went through host memory, and how many ranks saw the run end before its
// time.
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
#include "forms.hpp"

namespace {

using namespace pipex::device;
constexpr std::uint32_t kUnderWay = 2, kAlive = 2;
constexpr std::uint64_t kSources = 3;  // that a rank fills in turn
constexpr std::size_t kTensors = 3;
constexpr std::int32_t kDevice = 2;      // DLPack's CUDA, so that a tensor tells which memory it is in
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
  Message(int rank, std::uint64_t number, const Traffic& traffic) : tag(kTensors * (2 * number + rank)) {
    std::minstd_rand random(static_cast<std::uint32_t>(tag + 1));
    random.discard(2);
    const std::size_t most = traffic.words * std::min(traffic.messages, 2 * number + 1) / traffic.messages;
    for (std::size_t left = 1 + random() % kTensors; left > 0; --left) words.push_back(random() % (most + 1));
  }

  /// Where its tensors are in a buffer for the largest one.
  std::vector<std::uintptr_t> in(DevicePointer buffer, const Traffic& traffic) const {
    std::vector<std::uintptr_t> places;
    for (std::size_t i = 0; i < words.size(); ++i) places.push_back(buffer + 8 * traffic.words * i);
    return places;
  }

  std::uint64_t tag;  // of the first tensor
  std::vector<std::size_t> words;
};

std::vector<std::uintptr_t> data_of(const pipex::Received& received) {
  std::vector<std::uintptr_t> places;
  for (std::size_t i = 0; i < received.count(); ++i)
    places.push_back(reinterpret_cast<std::uintptr_t>(received[i].managed.tensor.data));
  return places;
}

/// Received messages on their way to the thread that gives them back.
class Kept {
 public:
  void put(pipex::Received received, const Message& message) {
    const std::lock_guard lock(mutex_);
    kept_.emplace_back(std::move(received), message);
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
      changed_.wait(lock, [&] { return closed_ || kept_.size() > kept || (hurry_ && !kept_.empty()); });
      if (kept_.empty()) return;
      hurry_ = false;
      std::swap(kept_[random() % kept_.size()], kept_.back());
      const auto [received, message] = std::move(kept_.back());
      kept_.pop_back();
      lock.unlock();
      const auto data = data_of(received);
      for (std::size_t i = 0; i < data.size(); ++i) {
        simulator.check(compute, data[i], message.words[i], message.tag + i);
        simulator.fill(compute, data[i], message.words[i], kScribble);
      }
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::pair<pipex::Received, Message>> kept_;
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
        rank_(std::make_shared<Rank>(member_, simulator.path, 0, pipex::dlpack::Device{kDevice, 0})),
        compute_(rank_->gpu(), Urgency::compute) {}

  void run() {
    const Current current(*rank_->gpu());
    for (DevicePointer& source : sources_) source = allocate();
    own_ = allocate();
    gate_ = allocate();
    {
      const pipex::RingSize size{kUnderWay, kAlive};
      RingSender sender(rank_, peer_, size, {});
      RingReceiver receiver(rank_, peer_, size, {});
      connect(sender, receiver);
      if (traffic_.end < traffic_.messages) grow(sender, receiver);
      std::thread giving_back([&] { kept_.give_back_all(simulator_, compute_.get()); });
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
      kept_.close();
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

  std::uint64_t lent = 0, copied = 0, hosted = 0;
  bool aborted = false;

 private:
  DevicePointer allocate() const {
    DevicePointer pointer = 0;
    rank_->driver().check(rank_->driver().allocate(&pointer, std::max<std::size_t>(8, 8 * kTensors * traffic_.words)),
                          "allocate");
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

  /// A message as large as any, so that all others go from device to device.
  void grow(RingSender& sender, RingReceiver& receiver) {
    const std::vector<std::size_t> words(kTensors, traffic_.words);
    const std::vector<std::byte> data(8 * traffic_.words);
    const pipex::MessageForm form = form_of(words, 8);
    const pipex::MessageForm* news = nullptr;
    sender.send_from_host(form, std::vector(kTensors, reinterpret_cast<std::uintptr_t>(data.data())), 0, 0);
    receiver.receive(compute_.get(), 0, 0, true, news);
    meet();
    if (!sender.fits(form.payload_bytes(), nullptr)) std::abort();
  }

  void send(RingSender& sender, std::uint64_t number) {
    while (rank_->sent() < filled_[number % kSources]) {  // without a spin, which is most of the time under a sanitizer
      member_->control().raise_if_aborted();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    const Message message(number_, number, traffic_);
    const auto data = message.in(sources_[number % kSources], traffic_);
    for (std::size_t i = 0; i < data.size(); ++i)
      simulator_.fill(compute_.get(), data[i], message.words[i], message.tag + i);
    const pipex::MessageForm form = form_of(message.words, 8);
    const auto microbatch = static_cast<std::uint32_t>(number);
    if (sender.fits(form.payload_bytes(), nullptr)) {
      sender.send(form, data, compute_.get(), 1, microbatch);
      filled_[number % kSources] = ++sent_;
    } else {
      compute_.synchronize();
      sender.send_from_host(form, data, 1, microbatch);
      ++hosted;
    }
  }

  void receive(RingReceiver& receiver, std::uint64_t number) {
    const Message message(peer_, number, traffic_);
    const auto microbatch = static_cast<std::uint32_t>(number);
    const pipex::MessageForm* news = nullptr;
    pipex::Received received = receiver.receive(compute_.get(), 1, microbatch, true, news);
    const auto own = message.in(own_, traffic_);
    if (received.empty()) {
      receiver.receive_into(own, compute_.get(), 1, microbatch);
      check(message, own);
      kept_.one_too_many();
      ++copied;
      return;
    }
    const auto data = data_of(received);
    if (received[0].managed.tensor.device.type == kDevice) {
      check(message, data);
      kept_.put(std::move(received), message);
      ++lent;
      return;
    }
    for (std::size_t i = 0; i < data.size(); ++i)
      rank_->driver().copy_in(own[i], reinterpret_cast<const void*>(data[i]), 8 * message.words[i], compute_.get());
    compute_.synchronize();
    check(message, own);
  }

  void check(const Message& message, const std::vector<std::uintptr_t>& data) const {
    for (std::size_t i = 0; i < data.size(); ++i)
      simulator_.check(compute_.get(), data[i], message.words[i], message.tag + i);
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
  std::uint64_t filled_[kSources]{};  // messages from device memory when it was last sent
  std::uint64_t sent_ = 0;            // of them
  Kept kept_;
};

}  // namespace

int main(int count, char** arguments) {
  const Simulator simulators[] = {Simulator(arguments[1]), Simulator(arguments[2])};
  const std::uint64_t messages = std::strtoull(arguments[3], nullptr, 10);
  const bool ends = count > 5;
  const Traffic traffic{messages, std::strtoull(arguments[4], nullptr, 10),
                        ends ? std::strtoull(arguments[5], nullptr, 10) : messages};
  const auto control = pipex::Control::create(2);
  std::atomic<std::uint64_t> lent = 0, copied = 0, hosted = 0;
  std::atomic<int> aborted = 0;
  const auto live = [&](int number) {
    Life life(simulators[number], control, number, traffic);
    life.run();
    lent += life.lent;
    copied += life.copied;
    hosted += life.hosted;
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
  std::printf("%llu %llu %llu %d\n", static_cast<unsigned long long>(lent), static_cast<unsigned long long>(copied),
              static_cast<unsigned long long>(hosted), aborted.load());
  if (wrong != 0) std::fprintf(stderr, "%llu wrong words or mappings left\n", static_cast<unsigned long long>(wrong));
  return wrong == 0 ? 0 : 1;
}
