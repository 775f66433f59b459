#include "host/list_scheduler.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace pipex {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

/// An action that a rank could run next.
struct Candidate {
  std::int64_t due;
  int kind, stage;
  std::int64_t ready;

  bool before(const Candidate& other) const {
    return std::tie(due, kind, stage) < std::tie(other.due, other.kind, other.stage);
  }
};

class ListScheduler {
 public:
  ListScheduler(const SchedulingProblem& problem, const DueDates& due) : problem_(problem), due_(due) {
    const auto table = static_cast<std::size_t>(problem.stages) * problem.microbatches;
    for (auto& ends : end_) ends.assign(table, 0);
    for (auto& next : next_) next = problem.first_microbatch;
    held_.assign(problem.stages, 0);
    wake_.assign(problem.ranks, 0);
    idle_.assign(problem.ranks, false);
    room_.resize(problem.stages_of[0].size());
    candidates_.reserve(kKinds * problem.stages_of[0].size());
    orders_.resize(problem.actions());
    length_.assign(problem.ranks, 0);
  }

  std::optional<PackedOrders> run() {
    for (std::int64_t left = problem_.actions(); left > 0;) {
      const int rank = static_cast<int>(std::min_element(wake_.begin(), wake_.end()) - wake_.begin());
      const std::int64_t now = wake_[rank];
      if (now == kNever) return std::nullopt;
      collect(rank, now);
      if (const Candidate* chosen = choose(now)) {
        start(rank, now, *chosen);
        --left;
      } else {
        wake_[rank] = next_ready(now);
        idle_[rank] = true;
      }
    }
    return std::move(orders_);
  }

 private:
  std::int64_t& end(int kind, int stage, int microbatch) {
    return end_[kind][static_cast<std::size_t>(stage) * problem_.microbatches + microbatch];
  }

  std::int64_t due(int kind, int stage, int microbatch) const {
    return due_.start[microbatch] + due_.offset[kind][stage];
  }

  /// room_[k]: what an F of the rank's chunk k may still take without exceeding its own cap or that of a deeper one; of
  /// two pipes, its own cap or what both may hold together. Returns what the rank holds.
  std::int64_t measure_room(int rank) {
    const std::vector<int>& stages = problem_.stages_of[rank];
    if (problem_.pipes > 1) {
      std::int64_t both = 0, surge = 0;
      for (const int stage : stages) both += held_[stage], surge = std::max(surge, problem_.surge[stage]);
      for (std::size_t chunk = 0; chunk < stages.size(); ++chunk)
        room_[chunk] = std::min(due_.cap[stages[chunk]] - held_[stages[chunk]], problem_.limit[rank] - surge - both);
      return both;
    }
    std::int64_t held = 0;
    for (std::size_t chunk = 0; chunk < stages.size(); ++chunk) {
      held += held_[stages[chunk]];
      room_[chunk] = due_.cap[stages[chunk]] - held;
    }
    for (std::size_t chunk = stages.size() - 1; chunk > 0; --chunk)
      room_[chunk - 1] = std::min(room_[chunk - 1], room_[chunk]);
    return held;
  }

  /// Per stage and kind the next micro-batch, where it is known when it will be ready and where there is memory.
  void collect(int rank, std::int64_t now) {
    candidates_.clear();
    const std::int64_t left = problem_.limit[rank] - measure_room(rank);
    const std::vector<int>& stages = problem_.stages_of[rank];
    std::int64_t blocked = kNever;  // the earliest due date of an action that only lacks memory
    int first_w = -1;
    for (std::size_t chunk = 0; chunk < stages.size(); ++chunk) {
      const int s = stages[chunk];
      const bool begins = problem_.begins[s], ends = problem_.ends[s];
      if (const int m = next_[kForward][s]; m < (begins ? problem_.microbatch_end[s] : next_[kForward][s - 1])) {
        const std::int64_t ready = begins ? due_.release[m] : end(kForward, s - 1, m) + problem_.activation_hop[s - 1];
        const std::int64_t date = due(kForward, s, m);
        if (problem_.charge[s] <= room_[chunk])
          candidates_.push_back({date, kForward, s, ready});
        else if (ready - now <= due_.look)
          blocked = std::min(blocked, date);
      }
      if (const int m = next_[kInputGradient][s];
          m < next_[kForward][s] && (ends || m < next_[kInputGradient][s + 1])) {
        std::int64_t ready = end(kForward, s, m);
        if (!ends) ready = std::max(ready, end(kInputGradient, s + 1, m) + problem_.gradient_hop[s]);
        const std::int64_t date = due(kInputGradient, s, m);
        if (problem_.surge[s] == 0 || problem_.surge[s] <= left)
          candidates_.push_back({date, kInputGradient, s, ready});
        else if (ready - now <= due_.look)
          blocked = std::min(blocked, date);
      }
      if (const int m = next_[kWeightGradient][s]; m < next_[kInputGradient][s]) {
        const Candidate w{due(kWeightGradient, s, m), kWeightGradient, s, end(kInputGradient, s, m)};
        if (first_w < 0 || w.before(candidates_[first_w])) first_w = static_cast<int>(candidates_.size());
        candidates_.push_back(w);
      }
    }
    if (first_w >= 0) candidates_[first_w].due = std::min(candidates_[first_w].due, blocked);
  }

  /// The action to start now; null: wait.
  const Candidate* choose(std::int64_t now) const {
    const Candidate* urgent = nullptr;
    for (const Candidate& c : candidates_)
      if (c.ready - now <= due_.look && (!urgent || c.before(*urgent))) urgent = &c;
    if (!urgent || urgent->ready <= now) return urgent;
    const std::int64_t gap = urgent->ready - now;
    const Candidate* filler = nullptr;
    for (const Candidate& c : candidates_) {
      const std::int64_t share = c.kind == kWeightGradient ? 1000 - due_.overrun : 1000;
      const bool fits = problem_.duration[c.kind][c.stage] * share <= gap * 1000;
      if (c.ready <= now && fits && (!filler || c.before(*filler))) filler = &c;
    }
    return filler;
  }

  std::int64_t next_ready(std::int64_t now) const {
    std::int64_t next = kNever;
    for (const Candidate& c : candidates_)
      if (c.ready > now) next = std::min(next, c.ready);
    return next;
  }

  void start(int rank, std::int64_t now, const Candidate& chosen) {
    const auto [date, kind, stage, ready] = chosen;
    const int m = next_[kind][stage]++;
    const std::int64_t until = now + problem_.duration[kind][stage];
    orders_[rank * problem_.actions_per_rank() + length_[rank]++] = problem_.code(kind, stage, m);
    end(kind, stage, m) = until;
    wake_[rank] = until;
    idle_[rank] = false;
    switch (kind) {
      case kForward:
        held_[stage] += problem_.charge[stage];
        if (!problem_.ends[stage]) tell(problem_.rank_of[stage + 1], now);
        break;
      case kInputGradient:
        held_[stage] += problem_.deferred[stage] - problem_.charge[stage];
        if (!problem_.begins[stage]) tell(problem_.rank_of[stage - 1], now);
        break;
      default:
        held_[stage] -= problem_.deferred[stage];
    }
  }

  /// A rank that waits decides again when it learns of another action that will be ready.
  void tell(int rank, std::int64_t now) {
    if (idle_[rank]) wake_[rank] = std::min(wake_[rank], now);
  }

  const SchedulingProblem& problem_;
  const DueDates& due_;
  std::array<std::vector<std::int64_t>, kKinds> end_;
  std::array<std::vector<int>, kKinds> next_;  // per stage the next micro-batch
  std::vector<std::int64_t> held_;             // per stage
  std::vector<std::int64_t> wake_;             // per rank when it decides next
  std::vector<bool> idle_;
  std::vector<std::int64_t> room_;
  std::vector<Candidate> candidates_;
  PackedOrders orders_;
  std::vector<std::int64_t> length_;  // per rank the actions in orders_
};

}  // namespace

SchedulingProblem::SchedulingProblem(std::vector<int> rank_of, const std::vector<int>& passing,
                                     std::array<std::vector<std::int64_t>, kKinds> duration,
                                     std::vector<std::int64_t> activation_hop, std::vector<std::int64_t> gradient_hop,
                                     std::vector<std::int64_t> activation, std::vector<std::int64_t> kept,
                                     std::vector<std::int64_t> deferred, std::vector<std::int64_t> limit)
    : stages(static_cast<int>(rank_of.size())),
      ranks(static_cast<int>(limit.size())),
      pipes(static_cast<int>(passing.size())),
      microbatches(std::accumulate(passing.begin(), passing.end(), 0)),
      begins(stages),
      ends(stages),
      first_microbatch(stages),
      microbatch_end(stages),
      rank_of(std::move(rank_of)),
      stages_of(ranks),
      duration(std::move(duration)),
      activation_hop(std::move(activation_hop)),
      gradient_hop(std::move(gradient_hop)),
      activation(std::move(activation)),
      kept(std::move(kept)),
      deferred(std::move(deferred)),
      charge(stages),
      surge(stages),
      limit(std::move(limit)) {
  const auto per_stage = [&](const auto& values) { return values.size() == this->rank_of.size(); };
  const bool shared = pipes == 1 || (pipes == 2 && stages == 2 * ranks);
  const bool fits = ranks > 0 && stages > 0 && stages % ranks == 0 && microbatches > 0 && shared &&
                    std::all_of(passing.begin(), passing.end(), [](int number) { return number >= 0; }) &&
                    std::all_of(this->duration.begin(), this->duration.end(), per_stage) &&
                    per_stage(this->activation) && per_stage(this->kept) && per_stage(this->deferred) &&
                    this->activation_hop.size() + 1 == this->rank_of.size() &&
                    this->gradient_hop.size() + 1 == this->rank_of.size();
  if (!fits) throw std::invalid_argument("the parts of a scheduling problem do not fit together");
  for (int pipe = 0, s = 0, m = 0; pipe < pipes; m += passing[pipe++]) {
    begins[s] = true;
    for (; s < stages / pipes * (pipe + 1); ++s) first_microbatch[s] = m, microbatch_end[s] = m + passing[pipe];
    ends[s - 1] = true;
  }
  for (int s = 0; s < stages; ++s) {
    const std::int64_t most = std::max(this->activation[s], this->deferred[s]);
    charge[s] = this->kept[s] < this->activation[s] ? this->kept[s] : most;
    surge[s] = most - charge[s];
    stages_of.at(this->rank_of[s]).push_back(s);
  }
  for (const auto& held : stages_of)
    if (held.size() != stages_of[0].size()) throw std::invalid_argument("ranks hold different numbers of stages");
}

std::optional<PackedOrders> list_schedule(const SchedulingProblem& problem, const DueDates& due) {
  const auto microbatches = static_cast<std::size_t>(problem.microbatches);
  bool fits = due.start.size() == microbatches && due.release.size() == microbatches &&
              due.cap.size() == problem.rank_of.size();
  for (const auto& offset : due.offset) fits = fits && offset.size() == problem.rank_of.size();
  if (!fits) throw std::invalid_argument("the due dates are of another problem");
  return ListScheduler(problem, due).run();
}

}  // namespace pipex
