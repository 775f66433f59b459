"""interleaved: 1f1b with several chunks per rank, micro-batches in groups.

    rank 0 |0F0 0F1 2F0 2F1 0F2 ....2B0---- 0F3 2B1---- 2F2 0B0---- 2F3 0B1---- ....2B2---- ....2B3---- 0B2---- 0B3----
    rank 1 |....1F0 1F1 3F0 3B0---- 3F1 3B1---- 1F2 1B0---- 1F3 1B1---- 3F2 3B2---- 3F3 3B3---- 1B2---- 1B3---- ........

Time        M(F+I+W) + (P-1)(F+I+W)/V at no hop cost and M >= P. Hops cost (2PV-2) c more for P >= 2 a divisor of M
            and a hop c well below F/V; far more above. Larger groups hide hops.
Memory      (V-1)g + 2(P-1-r) + 1 chunks on rank r, g being the group (all MV if that is less); rank 0 at g = P:
            P + (P-1)/V micro-batches.
Constraints group from P to M (M < P: just M), with at least P in the last group too. Default: the smallest such
            group, P where P divides M.
Source      Megatron-LM (arXiv 2104.04473), figure 4; group is its microbatch-group-size-per-virtual-pipeline-stage.
            With the default and where torch's ScheduleInterleaved1F1B accepts M, the orders are equal to its own.
"""

from __future__ import annotations

from pipex.errors import PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.families.one_f_one_b import three_phases
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def interleaved(ranks: int, microbatches: int, chunks: int = 2, *, group: int | None = None) -> Plan:
    """A rank runs a group of micro-batches through its first chunk, then through its second and so on, then the next
    group; backwards likewise, from its last chunk on. It runs ahead by a group for each chunk but one and by two for
    each rank after it.

    Raises:
        PlanError: ``chunks`` is below 1, or ``group`` does not fit (names the nearest that do).
    """
    placement = Placement("loop", ranks, chunks)
    legal = legal_groups(ranks, microbatches)
    if group is None:
        group = legal[0]
    elif group not in legal:
        least = min(ranks, microbatches)
        rule = f"{least} to {microbatches}, no last group of fewer than {least}" if least < microbatches else str(least)
        near = [*[g for g in legal if g < group][-1:], *[g for g in legal if g > group][:1]]
        problem = f"wrong group for interleaved with {ranks} ranks and {microbatches} micro-batches"
        raise PlanError(problem, got=group, needed=rule, fix=f"nearest legal: {' and '.join(map(str, near))}")
    orders, peaks = [], []
    for rank in range(ranks):
        forward = in_groups(placement, rank, microbatches, group, Kind.F)
        backward = in_groups(placement, rank, microbatches, group, Kind.B)
        ahead = min((chunks - 1) * group + 2 * (ranks - 1 - rank), len(forward))
        orders.append(three_phases(forward, backward, ahead))
        peaks.append(min(ahead + 1, len(forward)))
    return Plan("interleaved", placement, microbatches, tuple(orders), tuple(peaks))


def legal_groups(least: int, microbatches: int) -> list[int]:
    """The group sizes, rising, with which no group has fewer than ``least`` micro-batches (than all, if those are
    fewer). In a smaller group than there are ranks, a rank would wait for the group to come around."""
    least = min(least, microbatches)
    return [g for g in range(least, microbatches + 1) if microbatches % g == 0 or microbatches % g >= least]


def in_groups(placement: Placement, rank: int, microbatches: int, group: int, kind: Kind) -> list[Action]:
    """All actions of a kind on ``rank``: group after group, within one chunk after chunk (F from the first on, the
    others from the last), within one in rising micro-batches."""
    stages = placement.stages_of(rank) if kind is Kind.F else placement.stages_of(rank)[::-1]
    return [
        Action(stage, kind, m)
        for first in range(0, microbatches, group)
        for stage in stages
        for m in range(first, min(first + group, microbatches))
    ]
