"""dualpipe: two copies of the model, down and up the ranks; a forward of one beside a backward of the other.

    rank 0 |0F0 0F1 0F2 7F4 7I4 7W4 7F5 0F3+7B5---- ....7F6+0B0---- 7B6---- ....7F7+0B1---- 7B7---- 0I2 0W2 0I3 0W3
    rank 1 |....1F0 6F4 1F1 6F5 1F2 6B4---- 6F6+1B0---- 1F3+6B5---- 6F7+1B1---- 6B6---- 1B2---- ....6I7 1I3 6W7 1W3
    rank 2 |....5F4 2F0 5F5 2F1 5F6 2B0---- 2F2+5B4---- 5F7+2B1---- 2F3+5B5---- 2B2---- 5B6---- ....2I3 5I7 2W3 5W7
    rank 3 |4F4 4F5 4F6 3F0 3I0 3W0 3F1 4F7+3B1---- ....3F2+4B4---- 3B2---- ....3F3+4B5---- 3B3---- 4I6 4W6 4I7 4W7

Time        beside its work the idlest rank waits (P/2-1)(F&B + I - 2W), F&B being the time of a fused pair, at F = I
            and no hop cost; less where I is longer than F.
Memory      P+1 micro-batches on every rank; two copies of the weights.
Constraints P even; M even and at least 2P. To gain from pairs the model must run a forward and a backward as one.
Source      DeepSeek-V3 (arXiv 2412.19437), figure 5; the steps are those of github.com/deepseek-ai/DualPipe.
"""

from __future__ import annotations

from pipex.errors import PlanError
from pipex.plan.families.phases import Phase, in_phases
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def dualpipe(ranks: int, microbatches: int) -> Plan:
    """The first half of the micro-batches passes stages 0 … P-1 down the ranks, the second stages P … 2P-1 up.

    The two ranks that are equally far from the nearer end run the same steps, with the pipes exchanged.

    Raises:
        PlanError: ``ranks`` is odd, or ``microbatches`` is odd or below twice the ranks.
    """
    if ranks % 2:
        nearest = f"{ranks - 1} or {ranks + 1}" if ranks > 1 else "2"
        raise PlanError("wrong number of ranks for dualpipe", got=ranks, needed=f"an even number, such as {nearest}")
    if microbatches < 2 * ranks:
        needed = f"at least {2 * ranks}, twice the ranks"
        raise PlanError("too few micro-batches for dualpipe", got=microbatches, needed=needed)
    if microbatches % 2:
        needed = f"an even number, such as {microbatches - 1} or {microbatches + 1}"
        raise PlanError("wrong number of micro-batches for dualpipe", got=microbatches, needed=needed)
    half = microbatches // 2
    orders = []
    for rank in range(ranks):
        down, up = (rank, 0), (2 * ranks - 1 - rank, half)
        near, far = (down, up) if rank < ranks // 2 else (up, down)
        steps = eight_steps(ranks // 2, min(rank, ranks - 1 - rank), half)
        orders.append(in_phases(steps, (near[0], far[0]), (near[1], far[1])))
    peaks = (ranks + 1,) * ranks
    return Plan("dualpipe", Placement("bidirectional", ranks, 2), microbatches, tuple(orders), peaks)


def eight_steps(ranks: int, rank: int, microbatches: int) -> list[Phase]:
    """What rank ``rank`` of ``ranks`` does that stand between an end and the turn, with ``microbatches`` per stage.

    Stage 0 is the one that the rank's first micro-batches reach first.
    """
    after = ranks - 1 - rank
    backwards = [f"{'B' if k <= rank else 'I'}{(k + 1) % 2}" for k in range(2 * (rank + 1))]
    deferred = [f"W{cell[1]}" for cell in backwards if cell[0] == "I"] + ["W0"] * after
    # At the turn the first pair does not run as one: the other ranks wait for both of its results.
    first = "F0 B1" if after == 0 else "F0&B1"
    return [
        ("F0", 2 * after),
        ("F0 F1", rank + 1),
        ("I1 W1 F1", after),
        (f"{first} F1&B0", 1),
        ("F0&B1 F1&B0", microbatches - 2 * ranks + rank),
        ("B1 F1&B0", after),
        (" ".join(backwards), 1),
        (" ".join(f"{weight} I0" for weight in deferred[:after]), 1),
        (" ".join(deferred[after:]), 1),
    ]
