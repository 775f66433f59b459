// Copies and stream memory operations, done right or, where a test asks for it, wrong. Send stream: the one of the
// greatest priority.
//
//     dropped-data-wait, dropped-credit-wait   a consumer's, a producer's wait does not wait
//     dropped-computed-wait                    the send stream does not wait for the computation (streams.cpp)
//     equal-wait                               waits for the very value instead of at least it
//     flag-without-generation                  a wait is content with any value but 0, as with flags that are 0 or 1
//     stale-lap                                a wait is content with the message before in its slot
//     flag-before-data, unordered              the flag overtakes its data; the data go by a queue of their own
//     wrong-slot, short-copy                   all data go where the first went; the last 64 bytes are not copied
//     early-release                            a slot is given back when the host says so, not in the stream's order
//     dropped-release, dropped-abort           it never is; the release of all waits at an abort is lost
//     source-free-at-once                      the source counts as copied before it is (streams.cpp)
//     late-enqueue                             what is sent is enqueued behind the compute stream's next wait only
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <ctime>

#include "simulator.hpp"

SIMULATED pipex::device::Result cuStreamCreateWithPriority(pipex::device::StreamHandle* handle, unsigned flags,
                                                           int priority);

namespace simulated {
namespace {

constexpr std::uint64_t kAbortValue = std::uint64_t{1} << 62;

/// Bug "flag-before-data": the copy that waits for its flag to be written first, by stream.
std::map<StreamHandle, std::function<Result()>> overtaken;

std::atomic<DevicePointer> waited = 0;  // the word of the last wait that is none for a credit

std::byte* at(DevicePointer pointer) { return reinterpret_cast<std::byte*>(pointer); }

void copy_in_pieces(std::byte* to, const std::byte* from, std::size_t bytes, Chance& chance) {
  const int delay = state().settings.delay_us;
  const std::size_t piece = delay == 0 ? bytes : std::max<std::size_t>(64, bytes / 8);
  for (std::size_t done = 0; done < bytes; done += piece) {
    std::memcpy(to + done, from + done, std::min(piece, bytes - done));
    chance.pause(delay);
  }
}

Result copy(const char* function, DevicePointer to, const void* from, std::size_t bytes, StreamHandle stream) {
  if (const Result result = enter(function)) return result;
  std::unique_lock lock(state().mutex);
  const Mapping* target = mapping_of({to, bytes});
  const bool imported = target != nullptr && !target->own();
  lock.unlock();
  const bool message = imported && is_send_stream(stream);
  if (message && bug("wrong-slot")) {
    static const DevicePointer first = to;
    to = first;
  }
  if (message && bug("short-copy")) bytes -= std::min<std::size_t>(bytes, 64);
  const bool poison = message && state().settings.poison;
  const Work work = [=](Chance& chance) {
    if (poison) {
      std::memset(at(to), 0x5A, bytes);
      chance.pause(state().settings.delay_us);
    }
    copy_in_pieces(at(to), static_cast<const std::byte*>(from), bytes, chance);
  };
  const std::vector<Range> touched = {{to, bytes}, {reinterpret_cast<std::uintptr_t>(from), bytes}};
  if (message && bug("flag-before-data")) {
    overtaken[stream] = [=] { return submit(stream, touched, work); };
    return kSuccess;
  }
  if (message && bug("unordered")) {
    static StreamHandle other = nullptr;
    if (other == nullptr) cuStreamCreateWithPriority(&other, kNonBlockingStream, kGreatestPriority + 2);
    return submit(other, touched, work);
  }
  return submit(stream, touched, work);
}

/// A memory operation is on 8 aligned bytes of device memory, or of host memory that the device sees.
bool is_flag(DevicePointer address) {
  const std::lock_guard lock(state().mutex);
  return address % 8 == 0 && mapping_of({address, 8}) != nullptr;
}

}  // namespace

void await_word(const std::uint64_t* word, const std::function<bool(std::uint64_t)>& ready) {
  auto& value = *reinterpret_cast<const std::atomic<std::uint64_t>*>(word);
  for (;;) {
    const std::uint64_t seen = value.load(std::memory_order_acquire);
    if (ready(seen) || state().stopping) return;
    const timespec slice{0, 5'000'000};
    ::syscall(SYS_futex, word, FUTEX_WAIT, static_cast<std::uint32_t>(seen), &slice, nullptr, 0);
  }
}

void store_word(std::uint64_t* word, std::uint64_t value) {
  reinterpret_cast<std::atomic<std::uint64_t>*>(word)->store(value, std::memory_order_release);
  ::syscall(SYS_futex, word, FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
}

}  // namespace simulated

using namespace simulated;

SIMULATED Result cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, std::size_t bytes, StreamHandle stream) {
  return copy("cuMemcpyDtoDAsync_v2", to, at(from), bytes, stream);
}

SIMULATED Result cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, std::size_t bytes, StreamHandle stream) {
  return copy("cuMemcpyHtoDAsync_v2", to, from, bytes, stream);
}

SIMULATED Result cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, std::size_t bytes, StreamHandle stream) {
  return copy("cuMemcpyDtoHAsync_v2", reinterpret_cast<std::uintptr_t>(to), at(from), bytes, stream);
}

SIMULATED Result cuMemsetD8Async(DevicePointer to, unsigned char value, std::size_t bytes, StreamHandle stream) {
  if (const Result result = enter("cuMemsetD8Async")) return result;
  return submit(stream, {{to, bytes}}, [=](Chance&) { std::memset(at(to), value, bytes); });
}

SIMULATED Result cuStreamWaitValue64_v2(StreamHandle stream, DevicePointer address, std::uint64_t value,
                                        unsigned flags) {
  if (const Result result = enter("cuStreamWaitValue64_v2")) return result;
  if (flags != kWaitGreaterOrEqual || !is_flag(address)) return kInvalidValue;
  const bool sending = is_send_stream(stream);
  if (!sending) waited = address;
  if (bug(sending ? "dropped-credit-wait" : "dropped-data-wait")) return kSuccess;
  if (bug("flag-without-generation")) value = std::min<std::uint64_t>(value, 1);
  if (bug("stale-lap")) value -= std::min<std::uint64_t>(value, 1);
  const bool equal = bug("equal-wait");
  const Result result = submit(stream, {{address, 8}}, [=](Chance&) {
    await_word(reinterpret_cast<const std::uint64_t*>(address), [=](std::uint64_t seen) {
      return equal ? seen == value : static_cast<std::int64_t>(seen - value) >= 0;
    });
  });
  if (bug("late-enqueue") && !sending) {
    const std::lock_guard lock(state().mutex);
    enqueue_held();  // behind this wait, though the host called for them before
  }
  return result;
}

SIMULATED Result cuStreamWriteValue64_v2(StreamHandle stream, DevicePointer address, std::uint64_t value,
                                         unsigned flags) {
  if (const Result result = enter("cuStreamWriteValue64_v2")) return result;
  if (flags != kWriteWithFence || !is_flag(address)) return kInvalidValue;
  std::unique_lock lock(state().mutex);
  const bool imported = !mapping_of({address, 8})->own();
  lock.unlock();
  const bool release = imported && !is_send_stream(stream) && value < kAbortValue;
  if (value >= kAbortValue && bug("dropped-abort")) return kSuccess;
  if (release && bug("dropped-release")) return kSuccess;
  const Work work = [=](Chance&) { store_word(reinterpret_cast<std::uint64_t*>(address), value); };
  if (release && bug("early-release")) {
    Chance chance(0);
    work(chance);
    return kSuccess;
  }
  const Result result = submit(stream, {{address, 8}}, work);
  if (const auto late = overtaken.find(stream); result == kSuccess && late != overtaken.end()) {
    const auto copy_now = std::move(late->second);
    overtaken.erase(late);
    return copy_now();
  }
  return result;
}

// Kernels for tests: word i of a message is known from its number.

namespace {

std::uint64_t word(std::uint64_t message, std::size_t i) { return (message + 1) * 0x9E3779B97F4A7C15u ^ i; }

constexpr std::size_t kPieces = 8;

}  // namespace

SIMULATED Result simulated_fill(StreamHandle stream, DevicePointer to, std::size_t words, std::uint64_t message) {
  return submit(stream, {{to, words * 8}}, [=](Chance& chance) {
    auto* values = reinterpret_cast<std::uint64_t*>(to);
    for (std::size_t i = 0; i < words; ++i) {
      if (i % (words / kPieces + 1) == 0) chance.pause(state().settings.delay_us);
      values[i] = word(message, i);
    }
  });
}

SIMULATED Result simulated_check(StreamHandle stream, DevicePointer from, std::size_t words, std::uint64_t message) {
  return submit(stream, {{from, words * 8}}, [=](Chance& chance) {
    const auto* values = reinterpret_cast<const std::uint64_t*>(from);
    std::uint64_t wrong = 0;
    for (std::size_t i = 0; i < words; ++i) {
      if (i % (words / kPieces + 1) == 0) chance.pause(state().settings.delay_us);
      wrong += values[i] != word(message, i);
    }
    const std::lock_guard lock(state().mutex);
    state().mismatches += wrong;
  });
}

SIMULATED DevicePointer simulated_waited() { return waited; }

/// Keeps a stream busy until a word becomes `value`.
SIMULATED Result simulated_hold(StreamHandle stream, const std::uint64_t* gate, std::uint64_t value) {
  return submit(stream, {}, [=](Chance&) { await_word(gate, [=](std::uint64_t seen) { return seen == value; }); });
}
