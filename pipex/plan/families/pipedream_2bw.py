"""pipedream-2bw: 1f1b without a flush: the weights change after every M micro-batches, with two versions of them.

    rank 0 |F0 F1 F2 ............B0--- F3 B1--- ...B2--- ...B3---
    rank 1 |...F0 F1 ......B0--- F2 B1--- F3 B2--- ...B3--- ......
    rank 2 |......F0 B0--- F1 B1--- F2 B2--- F3 B3--- ............

Time        one update: as 1f1b. Updates follow each other without a flush, so each further one takes M(F+I+W): no
            bubble. A hop costs what it costs in 1f1b.
Memory      P-r micro-batches on rank r, and two versions of its weights.
Constraints M >= P. (With fewer than P-1, micro-batches would enter before the version that they use is made.)
Source      PipeDream-2BW (arXiv 2006.09503): W(t+1) = W(t) - lr g(W(t-1)). Asynchronous, with the same delay of one
            update on all ranks.
"""

from __future__ import annotations

from dataclasses import replace

from pipex.errors import PlanError
from pipex.plan.families.one_f_one_b import one_f_one_b
from pipex.plan.plan import Plan


def pipedream_2bw(ranks: int, microbatches: int) -> Plan:
    """The orders of 1f1b for the ``microbatches`` of one update; k updates run the orders of k times as many.

    Raises:
        PlanError: fewer micro-batches than ranks.
    """
    if microbatches < ranks:
        problem = f"too few micro-batches per update for pipedream-2bw with {ranks} ranks"
        raise PlanError(problem, got=microbatches, needed=f"at least {ranks}, as many as ranks")
    return replace(one_f_one_b(ranks, microbatches), family="pipedream-2bw", update="delayed")
