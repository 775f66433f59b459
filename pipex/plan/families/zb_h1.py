"""zb-h1: 1f1b with the backward split, the weight gradients filling the bubble at the end.

    rank 0 |F0 F1 F2 ......I0 W0 F3 I1 W1 I2 W2 I3 W3
    rank 1 |...F0 F1 ...I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    rank 2 |......F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

Time        M(F+I+W) + (P-1)(F+I-W) at no hop cost, M >= P and W no longer than F and I; otherwise: simulate.
Memory      P micro-batches on every rank (M if that is less): no more than rank 0 of 1f1b. Of these rank r holds P-r
            whole and of the other r only what W needs.
Constraints none.
Source      Zero Bubble (arXiv 2401.10241), first handcrafted schedule, table 2.
"""

from __future__ import annotations

from pipex.plan.actions import Action, Kind
from pipex.plan.placement import Placement
from pipex.plan.plan import Orders, Plan


def zb_h1(ranks: int, microbatches: int) -> Plan:
    """A rank runs ahead by one forward for each rank after it, and keeps one weight gradient back for each before."""
    peaks = (min(ranks, microbatches),) * ranks
    return Plan("zb-h1", Placement("loop", ranks), microbatches, in_turns(ranks, microbatches, 1), peaks)


def in_turns(ranks: int, microbatches: int, stretch: int) -> Orders:
    """In turn x, rank r runs F of micro-batch x, I of x - stretch (P-1-r) and W of x - stretch (P-1), as far as these
    exist."""
    return tuple(
        tuple(
            Action(rank, kind, turn - lag)
            for turn in range(microbatches + stretch * (ranks - 1))
            for kind, lag in ((Kind.F, 0), (Kind.I, stretch * (ranks - 1 - rank)), (Kind.W, stretch * (ranks - 1)))
            if 0 <= turn - lag < microbatches
        )
        for rank in range(ranks)
    )
