#include "host/control.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/named_error.hpp"

namespace pipex {
namespace {

constexpr std::uint32_t kVersion = 2;  // of the layout of this page and of the ring
constexpr int kMaxRanks = 4096;

}  // namespace

const char* name(Ending ending) {
  switch (ending) {
    case Ending::lost:
      return "lost";
    case Ending::stalled:
      return "stalled";
    default:
      return "failed";
  }
}

struct Control::Head {
  std::uint32_t version;
  std::uint32_t ranks;
  alignas(64) std::atomic<std::uint32_t> winner;  // 1 + writer of the record that counts; 0: the run goes on
};

Control::Control(Segment segment, int ranks)
    : segment_(std::move(segment)),
      ranks_(ranks),
      head_(reinterpret_cast<Head*>(segment_.data())),
      parts_(reinterpret_cast<RankPart*>(segment_.data() + sizeof(Head))),
      recorded_(ranks + 1) {}

std::size_t Control::bytes_for(int ranks) { return sizeof(Head) + (ranks + 1) * sizeof(RankPart); }

std::shared_ptr<Control> Control::create(int ranks) {
  if (ranks < 1 || ranks > kMaxRanks)
    throw NamedError("InputError", "a run cannot have this number of ranks", std::to_string(ranks),
                     "1 to " + std::to_string(kMaxRanks), "");
  std::shared_ptr<Control> control(new Control(Segment::create(bytes_for(ranks)), ranks));
  control->head_->version = kVersion;
  control->head_->ranks = static_cast<std::uint32_t>(ranks);
  for (int rank = 0; rank < ranks; ++rank) control->part(rank).progress.store({0, -1});
  return control;
}

std::shared_ptr<Control> Control::attach(int fd) { return check(Segment::attach(fd)); }

std::shared_ptr<Control> Control::open(const Address& address) { return check(Segment::open(address)); }

std::shared_ptr<Control> Control::check(Segment segment) {
  const auto* head = reinterpret_cast<const Head*>(segment.data());
  if (segment.size() < sizeof(Head) || head->version != kVersion)
    throw NamedError("ConfigMismatch", "this run was started by another version of pipex",
                     "version " + std::to_string(head->version), "version " + std::to_string(kVersion),
                     "use one version of pipex on all ranks");
  const std::uint32_t ranks = head->ranks;
  if (ranks < 1 || ranks > kMaxRanks || segment.size() != bytes_for(static_cast<int>(ranks)))
    throw NamedError("InputError", "this shared memory is not the control page of a run",
                     std::to_string(segment.size()) + " bytes for " + std::to_string(ranks) + " ranks", "", "");
  return std::shared_ptr<Control>(new Control(std::move(segment), static_cast<int>(ranks)));
}

void Control::record(int writer, Ending kind, int culprit, std::string_view text) {
  const std::lock_guard<std::mutex> lock(recording_);
  // A second record of this writer could overwrite the first one while others read it.
  if (aborted() || recorded_[writer]) return;
  recorded_[writer] = true;
  AbortRecord& record = part(writer).record;
  record.kind = kind;
  record.culprit = culprit;
  record.progress = part(culprit).progress.load();
  const std::size_t length = std::min(text.size(), AbortRecord::kTextBytes - 1);
  std::memcpy(record.text, text.data(), length);
  record.text[length] = 0;
  std::uint32_t nobody = 0;
  head_->winner.compare_exchange_strong(nobody, static_cast<std::uint32_t>(writer) + 1);
}

bool Control::aborted() const { return head_->winner.load() != 0; }

void Control::raise_if_aborted() const {
  const std::uint32_t winner = head_->winner.load();
  if (winner == 0) return;
  Aborted aborted(part(static_cast<int>(std::min<std::uint32_t>(winner - 1, ranks_))).record);
  aborted.record.text[AbortRecord::kTextBytes - 1] = 0;
  aborted.record.culprit = std::clamp(aborted.record.culprit, 0, ranks_ - 1);
  throw aborted;
}

Culprit Control::end_of_chain(int rank) const {
  std::vector<int> chain;
  while (std::find(chain.begin(), chain.end(), rank) == chain.end()) {
    chain.push_back(rank);
    // What a stopped process waited for may have come since.
    if (part(rank).presence.load() == Presence::joined && now_ns() - part(rank).heartbeat.load() > kStoppedAfter)
      return {rank, ""};
    const std::int32_t host_waits_on = part(rank).waiting_on.load();
    const int next = (host_waits_on != 0 ? host_waits_on : part(rank).device_waiting_on.load()) - 1;
    if (next < 0 || next >= ranks_) return {rank, ""};
    rank = next;
  }
  const auto cycle = std::find(chain.begin(), chain.end(), rank);
  std::rotate(cycle, std::min_element(cycle, chain.end()), chain.end());
  std::string text;
  for (auto member = cycle; member != chain.end(); ++member) text += std::to_string(*member) + " → ";
  return {*cycle, text + std::to_string(*cycle)};
}

}  // namespace pipex
