"""1f1b: after a warm-up, one forward and one backward in turn.

    rank 0 |F0 F1 F2 ............B0--- F3 B1--- ...B2--- ...B3---
    rank 1 |...F0 F1 ......B0--- F2 B1--- F3 B2--- ...B3--- ......
    rank 2 |......F0 B0--- F1 B1--- F2 B2--- F3 B3--- ............

Time        M(F+I+W) + (P-1)(F+I+W) + [2(P-1)M/P + 2P-4] c, c being a hop, for P >= 2 a divisor of M;
            as gpipe at c = 0.
Memory      P-r micro-batches on rank r (M if that is less).
Constraints none; with M < P the steady phase is empty on the first ranks.
Source      PipeDream-Flush (arXiv 2006.09503); DAPPLE (arXiv 2007.01045).
"""

from __future__ import annotations

from pipex.plan.actions import Action, Kind
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def one_f_one_b(ranks: int, microbatches: int) -> Plan:
    """Rank r runs ahead by as many forwards as there are stages after it."""
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, microbatches)
        forward = [Action(rank, Kind.F, m) for m in range(microbatches)]
        backward = [Action(rank, Kind.B, m) for m in range(microbatches)]
        steady = microbatches - ahead
        warm_up = forward[:ahead]
        one_f_one_b = [action for pair in zip(forward[ahead:], backward[:steady], strict=True) for action in pair]
        cool_down = backward[steady:]
        orders.append((*warm_up, *one_f_one_b, *cool_down))
    peaks = tuple(min(ranks - rank, microbatches) for rank in range(ranks))
    return Plan("1f1b", Placement("loop", ranks), microbatches, tuple(orders), peak_activations=peaks)
