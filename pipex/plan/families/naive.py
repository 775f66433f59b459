"""naive: one micro-batch after another, forward through all stages, then back.

    rank 0 |F0 ..................B0--- F1 ..................B1---
    rank 1 |...F0 .........B0--- .........F1 .........B1--- ......
    rank 2 |......F0 B0--- ..................F1 B1--- ............

Time        M P (F+I+W) + 2M(P-1) c, c being a hop. Only one rank works at a time.
Memory      1 micro-batch on every rank.
Constraints none.
Source      plain model parallelism; the baseline of GPipe (arXiv 1811.06965), figure 2b.
"""

from __future__ import annotations

from pipex.plan.actions import Action, Kind
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def naive(ranks: int, microbatches: int) -> Plan:
    """Stage 0 begins a micro-batch when it has ended the one before, and so does every other stage."""
    orders = tuple(
        tuple(Action(rank, kind, m) for m in range(microbatches) for kind in (Kind.F, Kind.B)) for rank in range(ranks)
    )
    return Plan("naive", Placement("loop", ranks), microbatches, orders, peak_activations=(1,) * ranks)
