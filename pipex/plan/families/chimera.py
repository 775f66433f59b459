"""chimera: two copies of the model, down and up the ranks, each running 1f1b in the gaps of the other.

    rank 0 |0F0 0F1 ....7F2 7B2---- 7F3 7B3---- ....0B0---- ........0B1----
    rank 1 |....1F0 6F2 1F1 6F3 ....6B2---- 1B0---- 6B3---- 1B1---- ........
    rank 2 |....5F2 2F0 5F3 2F1 ....2B0---- 5B2---- 2B1---- 5B3---- ........
    rank 3 |4F2 4F3 ....3F0 3B0---- 3F1 3B1---- ....4B2---- ........4B3----

Time        M(F+B) + (P-2)B at M = P, with B = I+W, F <= B <= 2F and no hop cost. Concatenation adds (P-3)(B-F) for
            every P more (P >= 4). Doubling: M(F+B) + (P-2)(F+B)/2 for M a multiple of 2P; were both forwards of a
            pair handed over at its end, M(F+B) + (P-2)B at B = 2F.
Memory      P/2+1 + min(r, P-1-r) micro-batches on rank r for M >= P, P in the middle; doubling: P more for M >= 2P. No
            rank holds more than M. Two copies of the weights.
Constraints P even; M at least 2. Whole units are best: M a multiple of P, of 2P for doubling.
Source      Chimera (arXiv 2107.06925), with two pipes. Bubble at M = P: (P-2)/(2M+P-2) of the time at B = F,
            (P-2)/(3M/2+P-2) at B = 2F.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from pipex.errors import PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.memory import peak_memory
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan

Scaling = Literal["concatenation", "doubling"]


def chimera(ranks: int, microbatches: int, *, scaling: Scaling = "concatenation") -> Plan:
    """Units of P micro-batches, of 2P for doubling, follow each other. Half of a unit passes stages 0 … P-1 down the
    ranks, half stages P … 2P-1 up. Of the slots of a rank, one pipe's F and the other's B take the even ones, and the
    other two the odd ones.

    Args:
        scaling: what serves more micro-batches than ranks. "concatenation": one unit after another. "doubling":
            forwards run in pairs, a pair in a slot: no bubble between units, but twice the memory.

    Raises:
        PlanError: ``ranks`` is odd, there are fewer than 2 micro-batches, or ``scaling`` is unknown.
    """
    if ranks % 2:
        nearest = f"{ranks - 1} or {ranks + 1}" if ranks > 1 else "2"
        raise PlanError("wrong number of ranks for chimera", got=ranks, needed=f"an even number, such as {nearest}")
    if microbatches < 2:
        raise PlanError("too few micro-batches for chimera", got=microbatches, needed="at least 2, one for each pipe")
    if scaling not in get_args(Scaling):
        needed = f"one of {', '.join(get_args(Scaling))}"
        raise PlanError("unknown scaling for chimera", got=repr(scaling), needed=needed)
    doubling = scaling == "doubling"
    size, period, together = (2 * ranks, 3 * ranks, 2) if doubling else (ranks, 2 * ranks, 1)
    slots: list[list[tuple[float, int, Action]]] = [[] for _ in range(ranks)]
    for m in range(microbatches):
        unit, k = divmod(m, size)
        down = (min(size, microbatches - unit * size) + 1) // 2
        pipe, k = divmod(k, down)
        for position in range(ranks):
            forward: float = unit * period + 2 * (k // together) + position
            backward = unit * period + 2 * k + 2 * ranks - 1 - position
            if position == 0 and unit > 0 and not doubling:
                # Before the B of the previous slot, which ends its micro-batch, so that no rank waits for it.
                forward -= 1.5
            stage = pipe * ranks + position
            row = slots[ranks - 1 - position if pipe else position]
            row += (forward, m, Action(stage, Kind.F, m)), (backward, m, Action(stage, Kind.B, m))
    orders = tuple(tuple(action for *_, action in sorted(row)) for row in slots)
    plan = Plan("chimera", Placement("bidirectional", ranks, 2), microbatches, orders, (microbatches,) * ranks)
    ones = [1] * plan.placement.stages
    return replace(plan, peak_activations=tuple(map(int, peak_memory(plan, ones, ones))))
