"""pipedream-2bw: 1f1b without a flush: the weights change after every M/U micro-batches, with two versions of them.

    rank 0 |F0 F1 F2 ............B0--- F3 B1--- ...B2--- ...B3---
    rank 1 |...F0 F1 ......B0--- F2 B1--- F3 B2--- ...B3--- ......
    rank 2 |......F0 B0--- F1 B1--- F2 B2--- F3 B3--- ............

Time        as 1f1b. The U updates of a step follow each other without a flush, so each further one takes M/U (F+I+W):
            no bubble. A hop costs what it costs in 1f1b.
Memory      P-r micro-batches on rank r, and two versions of its weights.
Constraints M a multiple of U, M/U >= P. (With fewer than P-1, micro-batches would enter before the version that they
            use is made.)
Source      PipeDream-2BW (arXiv 2006.09503): W(t+1) = W(t) - lr g(W(t-1)). Asynchronous, with the same delay of one
            update on all ranks.
"""

from __future__ import annotations

from dataclasses import replace

from pipex.errors import PlanError
from pipex.plan.families.one_f_one_b import one_f_one_b
from pipex.plan.families.updates import with_updates
from pipex.plan.plan import Plan


def pipedream_2bw(ranks: int, microbatches: int, *, updates: int = 1) -> Plan:
    """The orders of 1f1b, with ``updates`` updates in a step, of ``microbatches / updates`` micro-batches each.

    Raises:
        PlanError: ``updates`` is below 1 or does not divide the micro-batches, or leaves each fewer of them than there
            are ranks.
    """
    if updates < 1:
        raise PlanError("too few updates for pipedream-2bw", got=updates, needed="at least 1")
    each, left = divmod(microbatches, updates)
    if left:
        problem = f"{updates} updates of pipedream-2bw cannot share the micro-batches evenly"
        nearest = f"{each * updates} or {(each + 1) * updates}" if each else updates
        raise PlanError(problem, got=microbatches, needed=f"a multiple of {updates}, such as {nearest}")
    if each < ranks:
        problem = f"too few micro-batches per update for pipedream-2bw with {ranks} ranks"
        raise PlanError(problem, got=each, needed=f"at least {ranks}, as many as ranks")
    plan = one_f_one_b(ranks, microbatches)
    return replace(plan, family="pipedream-2bw", orders=with_updates(plan.orders, each), update="delayed")
