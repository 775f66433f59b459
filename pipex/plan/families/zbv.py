"""zbv: down the ranks and back up, backwards split; no bubble in the span when F, I and W are equal.

    rank 0 |0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 ....
    rank 1 |....1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2

Time        M(F+I+W) + (P-1)F/2 at F = I = W, no hop cost and M >= 2P-1, the bubble being all before a rank's first or
            after its last action; otherwise: simulate. Given costs it is planned with them, and never longer.
Memory      P micro-batches on every rank (min(2P, 2M, M+r+1) chunks on rank r). Given a limit, at most that.
Constraints two chunks per rank; with M < 2P-1 the orders are those for 2P-1 micro-batches, without the ones not there.
Source      Zero Bubble (arXiv 2401.10241), section 6; the orders are equal to those of torch's ScheduleZBVZeroBubble.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipex.plan.costs import CostModel, RankCosts
from pipex.plan.families.phases import in_phases
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def zbv(
    ranks: int,
    microbatches: int,
    *,
    costs: CostModel | None = None,
    memory: float | Sequence[float] | None = None,
) -> Plan:
    """The published order, or given costs or a limit, the best of that and of orders planned with them.

    Args:
        costs: where only ``memory`` is given: one unit for F, I and W, no hops and equal activations.
        memory: one limit for all ranks or one per rank, in the unit of the costs' activation; None: on every rank what
            the published order holds.

    Raises:
        PlanError: no plan was found within the limit, though there may be one.
        InputError: the costs or the limits do not fit the ranks, or no plan at all keeps the limit.
    """
    plan = published(ranks, microbatches)
    if costs is None and memory is None:
        return plan
    from pipex.plan.families.planned import planned  # costs time that most plans need not pay

    return planned(plan, RankCosts.of(ranks) if costs is None else costs, memory)


def published(ranks: int, microbatches: int) -> Plan:
    """Stage 0 of a rank's rows is the one on the way down, stage 1 the one on the way up."""
    placement = Placement("v", ranks, 2)
    full = max(microbatches, 2 * ranks - 1)
    orders = []
    for rank in range(ranks):
        after = ranks - 1 - rank
        phases = [
            ("F0", 2 * after + 1),
            ("F1 F0", rank),
            ("F1 I1 W1", after + 1),
            ("F0 I0 W0 F1 I1 W1", full - ranks - after),
            ("I0 W0 F1 I1 W1", after),
            ("I0 I1", rank),
            ("I0 W0", after + 1),
            ("W1", rank),
            ("W0", rank),
        ]
        order = in_phases(phases, (rank, placement.stages - 1 - rank))
        orders.append(tuple(action for action in order if action.microbatch < microbatches))
    peaks = tuple(min(2 * ranks, 2 * microbatches, microbatches + rank + 1) for rank in range(ranks))
    return Plan("zbv", placement, microbatches, tuple(orders), peaks)
