"""gpipe: all forwards, then all backwards.

    rank 0 |F0 F1 F2 F3 ..................B0--- B1--- B2--- B3---
    rank 1 |...F0 F1 F2 F3 .........B0--- B1--- B2--- B3--- ......
    rank 2 |......F0 F1 F2 F3 B0--- B1--- B2--- B3--- ............

Time        M(F+I+W) + (P-1)(F+I+W) + 2(P-1) c, c being a hop; bubble (P-1)/(M+P-1) at c = 0.
Memory      M micro-batches on every rank.
Constraints none.
Source      GPipe (arXiv 1811.06965), figure 2c; there the backwards run in falling order, here in rising order, so
            that gradients are summed as without a pipeline. Time and memory are the same.
"""

from __future__ import annotations

from pipex.plan.actions import Action, Kind
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def gpipe(ranks: int, microbatches: int) -> Plan:
    """Every rank runs its F of all micro-batches, then its B of all micro-batches."""
    orders = tuple(
        tuple(Action(rank, kind, m) for kind in (Kind.F, Kind.B) for m in range(microbatches)) for rank in range(ranks)
    )
    return Plan("gpipe", Placement("loop", ranks), microbatches, orders, peak_activations=(microbatches,) * ranks)
