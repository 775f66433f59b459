"""pipedream: 1f1b without a flush: the weights change after every backward.

    rank 0 |F0 F1 F2 ............B0--- F3 B1--- ...B2--- ...B3---
    rank 1 |...F0 F1 ......B0--- F2 B1--- F3 B2--- ...B3--- ......
    rank 2 |......F0 B0--- F1 B1--- F2 B2--- F3 B3--- ............

Time        M(F+I+W) + (P-1)(F+I+W) at no hop cost, once: M more micro-batches take M(F+I+W) more, no bubble. A hop
            costs what it costs in 1f1b.
Memory      P-r micro-batches on rank r (M if that is less), and as many versions of its weights, from
            M = 2(P-1-r) on.
Constraints none.
Source      PipeDream (arXiv 1806.03377), weight stashing: the backward of a micro-batch uses the weights that its
            forward used. Asynchronous: on rank r those of micro-batch m have had max(0, m-(P-1-r)) updates of m, so
            the result is not that of training without a pipeline.
"""

from __future__ import annotations

from dataclasses import replace

from pipex.plan.families.one_f_one_b import one_f_one_b
from pipex.plan.families.updates import with_updates
from pipex.plan.plan import Plan


def pipedream(ranks: int, microbatches: int) -> Plan:
    """The orders of 1f1b; ``microbatches`` is the length of the whole run, each with an update of its own."""
    plan = one_f_one_b(ranks, microbatches)
    return replace(plan, family="pipedream", orders=with_updates(plan.orders, every=1), update="microbatch")
