"""1f1b: after a warm-up, one forward and one backward in turn.

    rank 0 |F0 F1 F2 ............B0--- F3 B1--- ...B2--- ...B3---
    rank 1 |...F0 F1 ......B0--- F2 B1--- F3 B2--- ...B3--- ......
    rank 2 |......F0 B0--- F1 B1--- F2 B2--- F3 B3--- ............

Time        M(F+I+W) + (P-1)(F+I+W) + [2(P-1)M/P + 2P-4] c, c being a hop, for P >= 2 a divisor of M;
            as gpipe at c = 0. Extra warm-up hides hops; with warmup = P-1 only 2(P-1) c of them remain, for c up to
            half of F+I+W.
Memory      P-r micro-batches on rank r, and min(warmup, P-1-r) more (M if that is less): at most P + warmup.
Constraints warmup from 0 to P-1; with M < P the steady phase is empty on the first ranks.
Source      PipeDream-Flush (arXiv 2006.09503); DAPPLE (arXiv 2007.01045). warmup = P-1 is eager 1F1B, as in
            figure 1 of arXiv 2405.15362.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipex.errors import PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def one_f_one_b(ranks: int, microbatches: int, *, warmup: int = 0) -> Plan:
    """Rank r runs ahead by as many forwards as there are stages after it, and by up to ``warmup`` more, but never by
    more than twice as many: the time in which a micro-batch goes to the last stage and comes back.

    Raises:
        PlanError: ``warmup`` is not within 0 … P-1.
    """
    if not 0 <= warmup < ranks:
        needed = f"0 (plain 1F1B) to {ranks - 1} (eager 1F1B)"
        raise PlanError(f"wrong warmup for 1f1b with {ranks} ranks", got=warmup, needed=needed)
    orders, peaks = [], []
    for rank in range(ranks):
        after = ranks - 1 - rank
        ahead = min(after + min(warmup, after), microbatches)
        forward = [Action(rank, Kind.F, m) for m in range(microbatches)]
        backward = [Action(rank, Kind.B, m) for m in range(microbatches)]
        orders.append(three_phases(forward, backward, ahead))
        peaks.append(min(ahead + 1, microbatches))
    return Plan("1f1b", Placement("loop", ranks), microbatches, tuple(orders), tuple(peaks))


def three_phases(forward: Sequence[Action], backward: Sequence[Action], ahead: int) -> tuple[Action, ...]:
    """Warm-up of ``ahead`` forwards, then one forward and one backward in turn, then the other backwards."""
    steady = len(forward) - ahead
    warm_up = forward[:ahead]
    one_f_one_b = [action for pair in zip(forward[ahead:], backward[:steady], strict=True) for action in pair]
    cool_down = backward[steady:]
    return (*warm_up, *one_f_one_b, *cool_down)
