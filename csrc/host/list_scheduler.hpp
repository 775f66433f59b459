// The native twin of pipex/plan/list_scheduler: the same integer arithmetic, so the same plans; the Python is the
// reference and explains the rules.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace pipex {

/// F, I and W, as they index the arrays below. Ties between due dates are broken in this order.
constexpr int kKinds = 3;
enum ActionKind : int { kForward, kInputGradient, kWeightGradient };

/// Sizes, times and memory of one pipeline; whole numbers. Stages are on ranks as rank_of says, as many on each. With
/// two pipes, as many micro-batches pass each as `passing` says, those of the first with the lower numbers, and rank
/// ranks - 1 - r holds what rank r holds.
struct SchedulingProblem {
  SchedulingProblem(std::vector<int> rank_of, const std::vector<int>& passing,
                    std::array<std::vector<std::int64_t>, kKinds> duration, std::vector<std::int64_t> activation_hop,
                    std::vector<std::int64_t> gradient_hop, std::vector<std::int64_t> activation,
                    std::vector<std::int64_t> kept, std::vector<std::int64_t> deferred,
                    std::vector<std::int64_t> limit);

  /// An action as one number, as it stands in packed orders.
  std::int64_t code(int kind, int stage, int microbatch) const {
    return (static_cast<std::int64_t>(kind) * stages + stage) * microbatches + microbatch;
  }
  std::int64_t codes() const { return std::int64_t{kKinds} * stages * microbatches; }
  std::int64_t actions() const { return codes() / pipes; }
  std::int64_t actions_per_rank() const { return actions() / ranks; }

  int twin_of(int rank) const { return pipes > 1 ? ranks - 1 - rank : rank; }

  int stages, ranks, pipes, microbatches;
  std::vector<char> begins, ends;     // per stage whether it is the first or the last of its pipe
  std::vector<int> first_microbatch;  // per stage, and the one after the last
  std::vector<int> microbatch_end;
  std::vector<int> rank_of;
  std::vector<std::vector<int>> stages_of;  // per rank, rising
  std::array<std::vector<std::int64_t>, kKinds> duration;
  std::vector<std::int64_t> activation_hop, gradient_hop;  // [s]: between stages s and s + 1
  std::vector<std::int64_t> activation, kept, deferred;    // per stage
  std::vector<std::int64_t> charge;                        // per stage: what an F has to find free
  std::vector<std::int64_t> surge;                         // per stage: what an I has to find free beside that
  std::vector<std::int64_t> limit;                         // per rank
};

/// What a rule says about a problem. Due dates are in thousandths of its unit of time.
struct DueDates {
  std::vector<std::int64_t> start;                       // per micro-batch
  std::array<std::vector<std::int64_t>, kKinds> offset;  // per stage; an action is due at start + offset
  std::vector<std::int64_t> release;                     // per micro-batch: no F of stage 0 before this time
  std::vector<std::int64_t> cap;                         // per stage: what its rank's chunks up to it may hold
  std::int64_t look;                                     // how long a rank waits for a more urgent action
  std::int64_t overrun;                                  // thousandths of a W by which it may end too late
};

/// All actions of rank 0 in order, then those of rank 1, and so on.
using PackedOrders = std::vector<std::int64_t>;

/// nullopt: some rank had no memory left for what had to come next.
std::optional<PackedOrders> list_schedule(const SchedulingProblem& problem, const DueDates& due);

struct Replay {
  std::int64_t makespan, span;
  std::vector<std::int64_t> peaks;  // per rank
};

/// Everything as early as its rank's order allows; nullopt: ranks wait for each other for ever.
/// Throws std::invalid_argument for orders that are not of this problem.
std::optional<Replay> replay(const SchedulingProblem& problem, const PackedOrders& orders);

/// Orders at least as good after that many trials of moving an action of the critical path; `of_span`: by the span,
/// else by the makespan. Throws as replay.
PackedOrders improve(const SchedulingProblem& problem, const PackedOrders& orders, std::uint64_t seed,
                     std::int64_t trials, bool of_span);

}  // namespace pipex
