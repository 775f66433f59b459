// A CUDA driver for tests, without a GPU: device memory is host memory in memfds that other processes can map, streams
// are labels on hardware queues, and every queue is a thread that works in the order of enqueuing. What it does between
// two operations, and between the pieces of one, is left to a seeded chance, so that reads that come early show.
//
//     SIMULATED_CUDA="seed=3,queues=2,delay=200,fail:cuMemAlloc_v2=2,attribute:122=0"
//
//     seed        of the chance                                          queues      hardware queues per priority (8)
//     delay       longest pause in µs between two pieces of work (0)     shared      1: all priorities share the queues
//     poison      1: a slot is spoilt before it is filled                bug         what to do wrong (operations.cpp)
//     memory      bytes of the largest allocation (1 GiB)
//     fail:NAME   that function returns this number; N@3: from its third call on
//     attribute:N what cuDeviceGetAttribute says of N
//
// A test may set them anew while streams work (simulated_set); of another number of queues only new streams know.
//
// The NULL stream is the calling thread itself: an operation on it is done when the call returns, as the tensors of the
// tests, which are torch's on the CPU, need it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "device/driver_api.hpp"

#define SIMULATED extern "C" __attribute__((visibility("default")))

namespace simulated {

using namespace pipex::device;

constexpr int kGreatestPriority = -5;

struct Failure {
  Result result;
  int from_call;
  int calls = 0;
};

struct Settings {
  std::uint64_t seed = 0;
  int sown = 0;  // which time the seed was set, of all in this process and those it was forked from
  int queues = 8;
  std::atomic<int> delay_us = 0;
  std::atomic<std::size_t> memory = std::size_t{1} << 30;
  bool shared = false, poison = false;
  std::string bug;
  std::map<std::string, Failure> failures;
  std::map<int, int> attributes;

  void set(const std::string& key, const std::string& value);
};

/// The seeded chance of one thread: of a queue by its number from 1 on, or 0.
class Chance {
 public:
  explicit Chance(int thread) : thread_(thread) {}

  /// Begins anew if the seed has been set since; the state's lock is held.
  void follow(const Settings& settings);
  void pause(int delay_us);

 private:
  std::uint64_t next();

  const std::uint64_t thread_;
  std::uint64_t state_ = 1;
  int sown_ = -1;
};

struct Range {
  std::uint64_t begin, bytes;
  bool overlaps(const Range& other) const { return begin < other.begin + other.bytes && other.begin < begin + bytes; }
};

using Work = std::function<void(Chance&)>;

class Queue;

struct Stream {
  int priority;
  bool blocking;  // the legacy stream waits for it
  Queue* queue;
  std::uint64_t enqueued = 0, done = 0;
  std::thread::id captured_by;  // nobody: it is not being captured
};

struct Event {
  std::shared_ptr<bool> reached = std::make_shared<bool>(true);  // of the latest record; an earlier one has its own
  bool on_send_stream = false;
};

struct Operation {
  Work work;
  std::shared_ptr<Stream> stream;
  std::vector<Range> touched;
};

/// One hardware queue.
class Queue {
 public:
  void put(Operation operation);
  bool touches(const Range& range);  // whether an operation under way does; the state's lock is held
  void join();

 private:
  void run(int number);

  std::deque<Operation> operations_;  // the front one is under way
  std::thread thread_;
};

/// A mapping of device memory, our own or a peer's, or of host memory.
struct Mapping {
  Range range{};
  int fd = -1;  // of our own device memory

  bool own() const { return fd >= 0; }
};

// Memory that other processes can map (exported.cpp).

/// Of `mapping->range.bytes`.
Result create_memory(Mapping* mapping);
IpcHandle handle_of(const Mapping& mapping);
Result open_memory(const IpcHandle& handle, Mapping* mapping);
void close_memory(const Mapping& mapping);

/// How many peers have it mapped; lies with the memory itself.
std::atomic<std::int32_t>& importers(const Mapping& mapping);

/// All there is in one process. A forked child starts with a fresh one, as if it had never called the driver.
struct State {
  Settings settings;
  std::mutex mutex;
  std::condition_variable changed;  // an operation is done, or one was added
  bool initialised = false;
  std::atomic<bool> stopping = false;  // all waits are over, nothing is done any more
  std::vector<std::unique_ptr<Queue>> queues;
  int queue_numbers = 0;
  std::map<int, int> streams_of_priority;
  std::map<StreamHandle, std::shared_ptr<Stream>> streams;
  std::map<EventHandle, std::shared_ptr<Event>> events;
  std::map<std::uint64_t, Mapping> mappings;  // by their begin
  std::map<void*, std::size_t> host_memory;
  std::uint64_t operations = 0;          // enqueued since the start
  std::uint64_t mismatches = 0;          // that simulated_check found
  std::atomic<std::uint64_t> drawn = 0;  // sum of the numbers that chance gave
  std::vector<Operation> held;           // bug "late-enqueue"
  std::string violations;                // one line for each misuse that a real driver answers with undefined behaviour
};

State& state();

/// Success, unless the function was told to fail, the driver is not initialised or (if needed) no context is current.
Result enter(const char* function, bool needs_context = true);

/// As `enter`, for a question that CUDA forbids while a graph is being captured, unless by another thread and the
/// asking one has said that those do not concern it. A real driver spoils the graph, too.
Result enter_question(const char* function);

/// Hands work to a stream, or does it here and now on the NULL stream.
Result submit(StreamHandle stream, std::vector<Range> touched, Work work);

/// Gives the queues what bug "late-enqueue" has held back; the state's lock is held.
void enqueue_held();

std::shared_ptr<Stream> find(StreamHandle stream);  // null for the NULL stream

/// Whether the stream is the one that pipex sends on; only the greatest priority tells.
bool is_send_stream(StreamHandle stream);

/// The mapping that holds the whole range; the state's lock is held.
const Mapping* mapping_of(const Range& range);

void violate(const std::string& what);  // the state's lock is held
bool bug(const char* name);

/// Returns once `word` fulfils `ready`; wakes at once when a write of any process changes it.
void await_word(const std::uint64_t* word, const std::function<bool(std::uint64_t)>& ready);
void store_word(std::uint64_t* word, std::uint64_t value);

}  // namespace simulated
