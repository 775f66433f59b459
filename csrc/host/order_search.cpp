// Replaying orders, and improving them step by step; twins of execution.py and improvement.py.
#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "host/list_scheduler.hpp"

namespace pipex {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kNone = -1;

/// Packed orders while all ranks run them as early as they allow. Buffers stay from run to run.
class Execution {
 public:
  explicit Execution(const SchedulingProblem& problem)
      : problem_(problem),
        microbatches_(problem.microbatches),
        table_(std::int64_t{problem.stages} * problem.microbatches),
        end_(problem.codes()),
        now_(problem.ranks),
        first_(problem.ranks),
        at_(problem.ranks),
        waits_for_(problem.ranks) {
    meaning_.reserve(problem.codes());
    for (int kind = 0; kind < kKinds; ++kind)
      for (int stage = 0; stage < problem.stages; ++stage) {
        meaning_.insert(meaning_.end(), microbatches_, {kind, stage});
        links_.push_back(link(kind, stage));
      }
  }

  int kind(std::int64_t code) const { return meaning_[code].kind; }
  int stage(std::int64_t code) const { return meaning_[code].stage; }
  std::int64_t end(std::int64_t code) const { return end_[code]; }
  std::int64_t duration(std::int64_t code) const { return problem_.duration[kind(code)][stage(code)]; }
  std::int64_t finish(int rank) const { return now_[rank]; }
  std::int64_t span(int rank) const { return std::max(now_[rank], now_[problem_.twin_of(rank)]) - first_[rank]; }

  /// The action whose message this one needs, and the hop of that; kNone where it needs none.
  std::pair<std::int64_t, std::int64_t> source(std::int64_t code) const {
    const Link& link = links_[token(code)];
    return {link.source == 0 ? kNone : code + link.source, link.hop};
  }

  /// Kind and stage of an action in one number.
  std::int64_t token(std::int64_t code) const { return std::int64_t{kind(code)} * problem_.stages + stage(code); }

  /// False: the ranks do not come to the end of these orders.
  bool run(const PackedOrders& orders) {
    std::fill(end_.begin(), end_.end(), kNone);
    std::fill(now_.begin(), now_.end(), 0);
    std::fill(first_.begin(), first_.end(), kNever);
    std::fill(at_.begin(), at_.end(), 0);
    std::fill(waits_for_.begin(), waits_for_.end(), kNone);
    todo_.resize(problem_.ranks);
    std::iota(todo_.begin(), todo_.end(), 0);
    std::int64_t left = problem_.actions();
    while (!todo_.empty()) {
      const int rank = todo_.back();
      todo_.pop_back();
      const std::int64_t before = at_[rank];
      if (!run_rank(rank, orders)) return false;
      left -= at_[rank] - before;
    }
    return left == 0;
  }

 private:
  /// Goes on until the end or until a message is missing. False: an action stands where it never can run.
  bool run_rank(int rank, const PackedOrders& orders) {
    const std::int64_t length = problem_.actions_per_rank();
    for (; at_[rank] < length; ++at_[rank]) {
      const std::int64_t code = orders[rank * length + at_[rank]];
      const int k = kind(code), s = stage(code);
      const bool own = k == kForward || end_[code - table_] != kNone;
      if (problem_.rank_of[s] != rank || end_[code] != kNone || !own) return false;
      const auto [needed, hop] = source(code);
      if (needed != kNone) {
        if (end_[needed] == kNone) {
          waits_for_[rank] = needed;
          return true;
        }
        now_[rank] = std::max(now_[rank], end_[needed] + hop);
      }
      first_[rank] = std::min(first_[rank], now_[rank]);
      now_[rank] += problem_.duration[k][s];
      end_[code] = now_[rank];
      if (const int other = links_[token(code)].user; other >= 0 && waits_for_[other] == code) {
        waits_for_[other] = kNone;
        todo_.push_back(other);
      }
    }
    return true;
  }

  struct Meaning {
    int kind, stage;
  };
  /// What the actions of one kind at one stage need and who needs them; `source` is added to the code, 0 for none.
  struct Link {
    std::int64_t source = 0, hop = 0;
    int user = -1;  // the rank
  };

  Link link(int kind, int s) const {
    const bool begins = problem_.begins[s], ends = problem_.ends[s];
    Link link;
    if (kind == kForward) {
      if (!begins) link.source = -microbatches_, link.hop = problem_.activation_hop[s - 1];
      if (!ends) link.user = problem_.rank_of[s + 1];
    } else if (kind == kInputGradient) {
      if (!ends) link.source = microbatches_, link.hop = problem_.gradient_hop[s];
      if (!begins) link.user = problem_.rank_of[s - 1];
    }
    return link;
  }

  const SchedulingProblem& problem_;
  const std::int64_t microbatches_, table_;
  std::vector<Meaning> meaning_;                // per action; divisions would take most of the time
  std::vector<Link> links_;                     // per kind and stage
  std::vector<std::int64_t> end_;               // per action; kNone: has not run
  std::vector<std::int64_t> now_, first_, at_;  // per rank: end, first start, position
  std::vector<std::int64_t> waits_for_;         // per rank the action whose message it needs
  std::vector<int> todo_;
};

void check(const SchedulingProblem& problem, const PackedOrders& orders) {
  const auto known = [&](std::int64_t code) {
    if (code < 0 || code >= problem.codes()) return false;
    if (problem.pipes == 1) return true;  // without a division
    const std::int64_t stage = code / problem.microbatches % problem.stages, m = code % problem.microbatches;
    return problem.first_microbatch[stage] <= m && m < problem.microbatch_end[stage];
  };
  if (static_cast<std::int64_t>(orders.size()) != problem.actions() ||
      !std::all_of(orders.begin(), orders.end(), known))
    throw std::invalid_argument("the orders are of another problem");
}

std::int64_t peak(const SchedulingProblem& problem, const Execution& execution, const std::int64_t* row) {
  std::int64_t held = 0, most = 0;
  for (std::int64_t position = 0; position < problem.actions_per_rank(); ++position) {
    const int kind = execution.kind(row[position]), stage = execution.stage(row[position]);
    switch (kind) {
      case kForward:
        held += problem.kept[stage];
        break;
      case kInputGradient:
        held -= problem.kept[stage];
        most = std::max(most, held + problem.activation[stage]);
        held += problem.deferred[stage];
        break;
      default:
        held -= problem.deferred[stage];
    }
    most = std::max(most, held);
  }
  return most;
}

/// SplitMix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  /// 0 to limit - 1.
  std::int64_t below(std::int64_t limit) {
    state_ += 0x9E3779B97F4A7C15;
    std::uint64_t mixed = (state_ ^ (state_ >> 30)) * 0xBF58476D1CE4E5B9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB;
    mixed ^= mixed >> 31;
    return static_cast<std::int64_t>((mixed >> 32) * static_cast<std::uint64_t>(limit) >> 32);
  }

 private:
  std::uint64_t state_;
};

class Improver {
 public:
  Improver(const SchedulingProblem& problem, const PackedOrders& orders, std::uint64_t seed, bool of_span)
      : problem_(problem), execution_(problem), random_(seed), of_span_(of_span), orders_(orders) {
    for (int kind = 0; kind < kKinds; ++kind)
      first_.insert(first_.end(), problem.first_microbatch.begin(), problem.first_microbatch.end());
  }

  PackedOrders run(std::int64_t trials) {
    const PackedOrders given = orders_;
    if (!execution_.run(given)) return given;  // so from here on every action is there once
    std::int64_t best_value = value();
    for (int rank = 0; rank < problem_.ranks; ++rank) number(rank);
    if (!execution_.run(orders_) || value() > best_value) return given;
    std::int64_t current = value();
    PackedOrders best = current < best_value ? orders_ : given;
    best_value = current;
    std::vector<std::int64_t> history(std::max<std::int64_t>(1, trials / 20), current);
    find_blocks();
    for (std::int64_t trial = 0; trial < trials; ++trial) {
      const auto [rank, source, target] = propose();
      const std::int64_t start = rank * problem_.actions_per_rank();
      if (execution_.token(orders_[start + source]) == execution_.token(orders_[start + target])) continue;
      move(rank, source, target);
      std::int64_t& earlier = history[trial % history.size()];
      const bool legal = peak(problem_, execution_, &orders_[start]) <= problem_.limit[rank] && execution_.run(orders_);
      if (legal && (value() <= current || value() <= earlier)) {
        current = value();
        if (current < best_value) best_value = current, best = orders_;
        find_blocks();
      } else {
        move(rank, target, source);
      }
      earlier = std::min(earlier, current);
    }
    return best;
  }

 private:
  /// Actions of a rank that run without a gap on the critical path.
  struct Block {
    int rank;
    std::int64_t first, last;
  };
  struct Move {
    int rank;
    std::int64_t source, target;
  };

  std::int64_t value(int rank) const { return of_span_ ? execution_.span(rank) : execution_.finish(rank); }

  int worst_rank() const {
    int worst = 0;
    for (int rank = 1; rank < problem_.ranks; ++rank)
      if (value(rank) > value(worst)) worst = rank;
    return worst;
  }

  std::int64_t value() const { return value(worst_rank()); }

  /// Gives the actions of each kind and stage their micro-batches in rising order.
  void number(int rank) {
    const std::int64_t length = problem_.actions_per_rank();
    next_ = first_;
    for (std::int64_t* action = &orders_[rank * length]; action != &orders_[0] + (rank + 1) * length; ++action)
      *action = execution_.token(*action) * problem_.microbatches + next_[execution_.token(*action)]++;
  }

  void move(int rank, std::int64_t source, std::int64_t target) {
    const auto row = orders_.begin() + rank * problem_.actions_per_rank();
    if (source < target)
      std::rotate(row + source, row + source + 1, row + target + 1);
    else
      std::rotate(row + target, row + source, row + source + 1);
    number(rank);
  }

  /// An action of a critical block goes before or behind the block, or a few places away.
  Move propose() {
    const Block& block = blocks_[random_.below(static_cast<std::int64_t>(blocks_.size()))];
    const std::int64_t source = block.first + random_.below(block.last - block.first + 1);
    const bool earlier = random_.below(2) != 0, near = random_.below(2) != 0;
    const std::int64_t distance = random_.below(4);
    const std::int64_t target =
        earlier ? (near ? source - 1 : block.first) - distance : (near ? source + 1 : block.last) + distance;
    return {block.rank, source, std::clamp<std::int64_t>(target, 0, problem_.actions_per_rank() - 1)};
  }

  /// The blocks of one critical path of the execution, from its end to time 0.
  void find_blocks() {
    const std::int64_t length = problem_.actions_per_rank();
    position_.resize(problem_.codes());
    for (std::size_t place = 0; place < orders_.size(); ++place) position_[orders_[place]] = place % length;
    blocks_.clear();
    const int worst = worst_rank(), twin = problem_.twin_of(worst);
    Block block{execution_.finish(twin) > execution_.finish(worst) ? twin : worst, length - 1, length - 1};
    while (true) {
      const std::int64_t* action = &orders_[block.rank * length + block.first];
      const std::int64_t start = execution_.end(*action) - execution_.duration(*action);
      if (start == 0) break;
      const auto [source, hop] = execution_.source(*action);
      const bool by_message = source != kNone && execution_.end(source) + hop == start;
      const bool by_rank = block.first > 0 && execution_.end(action[-1]) == start;
      if (by_rank && (!by_message || random_.below(2) != 0)) {
        --block.first;
        continue;
      }
      blocks_.push_back(block);
      block = {problem_.rank_of[execution_.stage(source)], position_[source], position_[source]};
    }
    blocks_.push_back(block);
  }

  const SchedulingProblem& problem_;
  Execution execution_;
  Random random_;
  const bool of_span_;
  PackedOrders orders_;
  std::vector<Block> blocks_;
  std::vector<std::int64_t> position_;      // per action, in its rank's order
  std::vector<std::int64_t> first_, next_;  // per kind and stage the first micro-batch, and the next while numbering
};

}  // namespace

std::optional<Replay> replay(const SchedulingProblem& problem, const PackedOrders& orders) {
  check(problem, orders);
  Execution execution(problem);
  if (!execution.run(orders)) return std::nullopt;
  Replay result{0, 0, {}};
  for (int rank = 0; rank < problem.ranks; ++rank) {
    result.makespan = std::max(result.makespan, execution.finish(rank));
    result.span = std::max(result.span, execution.span(rank));
    result.peaks.push_back(peak(problem, execution, &orders[rank * problem.actions_per_rank()]));
  }
  return result;
}

PackedOrders improve(const SchedulingProblem& problem, const PackedOrders& orders, std::uint64_t seed,
                     std::int64_t trials, bool of_span) {
  check(problem, orders);
  return Improver(problem, orders, seed, of_span).run(trials);
}

}  // namespace pipex
