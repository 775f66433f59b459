// The control page of a run: who is there, what each rank does and waits for, and how the run ended.
//
// No lock lies in shared memory and every word has one writer, so a process may die between any two instructions.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "host/futex.hpp"
#include "host/segment.hpp"

namespace pipex {

enum class Presence : std::uint32_t { absent = 0, joined = 1, left = 2 };

/// Why a run ended before its time.
enum class Ending : std::uint32_t { lost = 1, stalled = 2, failed = 3 };
const char* name(Ending ending);

/// What a rank does: `position` in its order of actions, or a negative phase (pipex.transport.interface.Phase).
struct Progress {
  std::uint32_t step;
  std::int32_t position;
  bool operator==(const Progress&) const = default;
};

/// A run's end: which rank caused it, what that rank was doing, and words for people.
struct AbortRecord {
  static constexpr std::size_t kTextBytes = 512;

  Ending kind;
  std::int32_t culprit;
  Progress progress;
  char text[kTextBytes];  // UTF-8, ends with 0
};

/// Thrown by every wait once the run has an abort record.
class Aborted : public std::exception {
 public:
  explicit Aborted(const AbortRecord& record) : record(record) {}
  const char* what() const noexcept override { return record.text; }

  AbortRecord record;
};

constexpr std::size_t kExchangeBytes = 64 * 1024;  // of one rank in one round

/// One rank's part of the page. The first line changes rarely, the second before every action.
struct RankPart {
  alignas(64) std::atomic<Presence> presence;
  std::atomic<std::int32_t> pid;
  std::atomic<std::uint64_t> start;
  std::atomic<std::int64_t> heartbeat;  // now_ns() of its watch thread, every 100 ms

  alignas(64) std::atomic<Progress> progress;
  std::atomic<std::int32_t> waiting_on;  // rank + 1; 0: waits for nobody
  // Of a rank with a GPU, which works while the host does something else; written by its rescue thread.
  std::atomic<std::int32_t> device_waiting_on;
  std::atomic<std::uint64_t> device_progress;  // messages that have gone through its streams

  alignas(64) std::atomic<std::uint64_t> posted;  // rounds of exchange this rank has written
  Doorbell bell;

  // Two buffers are enough: a rank writes round k only after all have posted k - 1, so all have read k - 2.
  struct Buffer {
    std::uint64_t total;   // bytes of the whole payload
    std::uint32_t length;  // bytes of this round
    std::byte bytes[kExchangeBytes];
  };
  alignas(64) Buffer buffers[2];

  alignas(64) AbortRecord record;  // written by this rank alone, before it tries to win
};
static_assert(std::atomic<Progress>::is_always_lock_free, "step and position must be read as a pair");

/// Nanoseconds without a heartbeat, of which one is due every 100 ms, that mean "stopped".
constexpr std::int64_t kStoppedAfter = 500'000'000;

/// The end of a chain of "rank a waits for rank b".
struct Culprit {
  int rank;
  std::string cycle;  // "0 → 1 → 0" if the ranks wait for each other, else empty
};

/// A mapped control page, as the launcher and every rank hold it.
class Control {
 public:
  static std::shared_ptr<Control> create(int ranks);
  static std::shared_ptr<Control> attach(int fd);
  static std::shared_ptr<Control> open(const Address& address);

  int ranks() const { return ranks_; }
  int fd() const { return segment_.fd(); }
  Address address() const { return segment_.address(); }
  void close_descriptor() { segment_.close_descriptor(); }

  RankPart& part(int rank) const { return parts_[rank]; }

  /// Writes how the run ended, unless somebody was first. `writer` is this process's rank, or ranks() for a launcher.
  void record(int writer, Ending kind, int culprit, std::string_view text);

  /// Whether the run has an abort record.
  bool aborted() const;

  /// Throws Aborted if it has.
  void raise_if_aborted() const;

  /// Follows the waits from `rank` on to one that waits for nobody or is stopped; of a cycle it names the lowest rank.
  Culprit end_of_chain(int rank) const;

 private:
  struct Head;

  explicit Control(Segment segment, int ranks);

  static std::size_t bytes_for(int ranks);
  static std::shared_ptr<Control> check(Segment segment);

  Segment segment_;
  int ranks_;
  Head* head_;
  RankPart* parts_;  // ranks + 1: the last one is the launcher's, for its record

  std::mutex recording_;        // a rank's own threads; never shared
  std::vector<bool> recorded_;  // by writer
};

}  // namespace pipex
