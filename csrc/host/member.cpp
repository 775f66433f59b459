#include "host/member.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "common/named_error.hpp"

namespace pipex {
namespace {

constexpr std::uint64_t kMaxPayload = 64 << 20;
constexpr std::chrono::seconds kEndIsKnownWithin{2};

std::string seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", value);
  return text;
}

}  // namespace

Patience::Patience(Control& control, int self, int peer, std::chrono::nanoseconds limit)
    : control_(control),
      self_(self),
      peer_(peer),
      limit_(limit),
      culprit_(control.end_of_chain(peer).rank),
      progress_(control.part(culprit_).progress.load()),
      device_progress_(control.part(culprit_).device_progress.load()),
      since_(now_ns()) {}

void Patience::check() {
  const Culprit culprit = control_.end_of_chain(peer_);
  const Progress progress = control_.part(culprit.rank).progress.load();
  const std::uint64_t device_progress = control_.part(culprit.rank).device_progress.load();
  if (culprit.rank != culprit_ || progress != progress_ || device_progress != device_progress_) {
    culprit_ = culprit.rank;
    progress_ = progress;
    device_progress_ = device_progress;
    since_ = now_ns();
  }
  if (now_ns() - since_ < limit_.count()) return;
  control_.record(self_, Ending::stalled, culprit.rank, reason(culprit));
  control_.raise_if_aborted();
}

std::string Patience::reason(const Culprit& culprit) const {
  const std::string limit = seconds(static_cast<double>(limit_.count()) * 1e-9);
  const RankPart& part = control_.part(culprit.rank);
  if (!culprit.cycle.empty()) return "is in a circle of waiting ranks (" + culprit.cycle + ") for " + limit;
  if (part.presence.load() == Presence::absent) return "has not joined within " + limit;
  if (part.presence.load() == Presence::left)
    return "has left the run while rank " + std::to_string(peer_) + " was awaited";
  const std::int64_t silence = now_ns() - part.heartbeat.load();
  if (silence > kStoppedAfter) return "is stopped: no heartbeat for " + seconds(static_cast<double>(silence) * 1e-9);
  return "is alive but made no progress for " + limit;
}

Member::Member(std::shared_ptr<Control> control, int rank, std::chrono::nanoseconds timeout, bool spin,
               void (*between_slices)())
    : control_(std::move(control)),
      rank_(rank),
      part_(control_->part(std::clamp(rank, 0, control_->ranks()))),
      timeout_(timeout),
      spin_ns_(spin ? kSpinFor.count() : 0),
      between_slices_(between_slices) {
  if (rank < 0 || rank >= control_->ranks())
    throw NamedError("InputError", "there is no such rank in this run", std::to_string(rank),
                     "0 to " + std::to_string(control_->ranks() - 1), "");
  std::int32_t nobody = 0;
  if (!part_.pid.compare_exchange_strong(nobody, ::getpid()))
    throw NamedError("InputError", "rank " + std::to_string(rank) + " of this run is taken",
                     "process " + std::to_string(nobody), "one process for each rank", "");
  part_.start.store(own_start_time());
  part_.heartbeat.store(now_ns());
  part_.presence.store(Presence::joined);
  watch_.emplace(control_, rank);
}

void Member::raise_if_ending() {
  const std::int64_t until = now_ns() + std::chrono::nanoseconds(kEndIsKnownWithin).count();
  wait_polling(kNobody, [until] { return now_ns() > until; });
}

void Member::leave() {
  part_.presence.store(Presence::left);
  watch_.reset();
}

std::vector<std::string> Member::exchange(std::string_view payload) {
  if (payload.size() > kMaxPayload)
    throw NamedError("InputError", "a payload between ranks is too long", std::to_string(payload.size()) + " bytes",
                     "at most " + std::to_string(kMaxPayload), "");
  std::vector<std::string> payloads(control_->ranks());
  std::uint64_t longest = payload.size();
  for (std::uint64_t done = 0; done == 0 || done < longest; done += kExchangeBytes) {  // once at least: a barrier too
    post(payload.substr(std::min<std::size_t>(done, payload.size()), kExchangeBytes), payload.size());
    for (int rank = 0; rank < control_->ranks(); ++rank) {
      const Piece piece = await(rank);
      payloads[rank].append(piece.bytes);
      if (piece.total > kMaxPayload || payloads[rank].size() != std::min(piece.total, done + kExchangeBytes))
        throw NamedError("MessageMismatch", "rank " + std::to_string(rank) + " sent a payload of impossible size",
                         std::to_string(payloads[rank].size()) + " of " + std::to_string(piece.total) + " bytes", "",
                         "use one version of pipex on all ranks");
      longest = std::max(longest, piece.total);
    }
  }
  return payloads;
}

void Member::post(std::string_view bytes, std::uint64_t total) {
  control_->raise_if_aborted();
  ++rounds_;
  RankPart::Buffer& buffer = part_.buffers[rounds_ % 2];
  buffer.total = total;
  buffer.length = static_cast<std::uint32_t>(bytes.size());
  std::memcpy(buffer.bytes, bytes.data(), bytes.size());
  part_.posted.store(rounds_);
  part_.bell.ring();
}

Member::Piece Member::await(int rank) {
  RankPart& part = control_->part(rank);
  wait(part.bell, rank, [&] { return part.posted.load() >= rounds_; });
  const RankPart::Buffer& buffer = part.buffers[rounds_ % 2];
  const std::size_t length = std::min<std::size_t>(buffer.length, kExchangeBytes);
  return {{reinterpret_cast<const char*>(buffer.bytes), length}, buffer.total};
}

}  // namespace pipex
