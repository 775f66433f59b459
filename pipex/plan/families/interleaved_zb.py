"""interleaved-zb: interleaved with the backward split, the weight gradients filling the bubble at the end.

    rank 0 |0F0 0F1 2F0 2F1 ....2I0 2W0 0F2 2I1 2W1 0F3 0I0 0W0 2F2 0I1 0W1 2F3 2I2 2W2 2I3 2W3 0I2 0W2 0I3 0W3
    rank 1 |....1F0 1F1 3F0 3I0 3F1 3I1 3W0 1F2 1I0 3W1 1F3 1I1 1W0 3F2 3I2 1W1 3F3 3I3 3W2 1I2 3W3 1I3 1W2 1W3

Time        M(F+I+W) + (P-1)(F+I-W)/V at F = I = W, no hop cost and M >= P; otherwise: simulate. Given costs it is
            planned with them, and never longer than the published order.
Memory      (V-1)g + P chunks on every rank, g being the group (all MV if that is less): P micro-batches at g = P. Given
            a limit, at most that.
Constraints none; the group is the smallest that interleaved accepts, P where P divides M.
Source      Zero Bubble (arXiv 2401.10241) on the placement of Megatron-LM (arXiv 2104.04473), after PyTorch's
            ScheduleInterleavedZeroBubble: where that accepts M, the orders are equal to its own. One chunk: zb-h1.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipex.plan.actions import Action, Kind
from pipex.plan.costs import CostModel, RankCosts
from pipex.plan.families.interleaved import in_groups, legal_groups
from pipex.plan.families.one_f_one_b import three_phases
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def interleaved_zb(
    ranks: int,
    microbatches: int,
    chunks: int = 2,
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
        PlanError: ``chunks`` is below 1; or no plan was found within the limit, though there may be one.
        InputError: the costs or the limits do not fit the ranks, or no plan at all keeps the limit.
    """
    plan = published(ranks, microbatches, chunks)
    if costs is None and memory is None:
        return plan
    from pipex.plan.families.planned import planned  # costs time that most plans need not pay

    return planned(plan, RankCosts.of(ranks) if costs is None else costs, memory)


def published(ranks: int, microbatches: int, chunks: int) -> Plan:
    """A rank runs ahead by a group of forwards for each chunk but one and by one for each rank after it, and keeps one
    weight gradient back for each rank before it."""
    placement = Placement("loop", ranks, chunks)
    group = legal_groups(ranks, microbatches)[0]
    orders, peaks = [], []
    for rank in range(ranks):
        forward = in_groups(placement, rank, microbatches, group, Kind.F)
        input_gradient = in_groups(placement, rank, microbatches, group, Kind.I)
        weight_gradient = iter(in_groups(placement, rank, microbatches, group, Kind.W))
        ahead = min((chunks - 1) * group + ranks - 1 - rank, len(forward))
        order: list[Action] = []
        back = 0
        for action in three_phases(forward, input_gradient, ahead):
            order.append(action)
            back += action.kind is Kind.I
            if action.kind is Kind.I and back > rank:
                order.append(next(weight_gradient))
        orders.append((*order, *weight_gradient))
        peaks.append(min(ahead + 1 + rank, len(forward)))
    return Plan("interleaved-zb", placement, microbatches, tuple(orders), tuple(peaks))
