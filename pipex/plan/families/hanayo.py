"""hanayo: one or more waves of stages down and up the ranks, the oldest micro-batch first.

    rank 0 |0F0 0F1 0F2 ........5F0 5B0---- 5F1 5B1---- 5F2 5B2---- ........0B0---- ........0B1---- ........0B2----
    rank 1 |....1F0 1F1 1F2 4F0 ....4F1 ....4B0---- 4F2 4B1---- ....1B0---- 4B2---- 1B1---- ........1B2---- ........
    rank 2 |........2F0 3F0 2F1 3F1 2F2 3F2 ........3B0---- 2B0---- 3B1---- 2B1---- 3B2---- 2B2---- ................

Time        M(F+I+W) + 2(P-1)F/w with w waves, at M = P, I+W = 2F and no hop cost; from two waves and four ranks on the
            bubble is longer by up to 1/9 (P to 16). Otherwise: simulate.
Memory      P micro-batches on the fullest rank (M if that is less).
Constraints an even number of chunks per rank, two per wave. Best at M a multiple of P.
Source      Hanayo (arXiv 2308.15762); its orders are not published as code, these are those of list scheduling.
"""

from __future__ import annotations

from heapq import heappop, heappush

from pipex.errors import PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan

_TIME = {Kind.F: 1, Kind.B: 2}


def hanayo(ranks: int, microbatches: int, chunks: int = 2) -> Plan:
    """A wave is two chunks. Every rank runs the oldest micro-batch that it can, at any time, when a B takes twice as
    long as an F. An F leaves room for the deeper chunks of its rank, so that what has begun can always end.

    Raises:
        PlanError: ``chunks`` is odd or below 2.
    """
    if chunks < 2 or chunks % 2:
        nearest = f"{chunks - 1} or {chunks + 1}" if chunks > 2 else "2"
        needed = f"an even number, two per wave, such as {nearest}"
        raise PlanError("wrong number of chunks per rank for hanayo", got=chunks, needed=needed)
    placement = Placement("wave", ranks, chunks)
    stages = range(placement.stages)
    path = [*((stage, Kind.F) for stage in stages), *((stage, Kind.B) for stage in reversed(stages))]
    done = [0] * microbatches  # how far along the path
    waiting: list[set[int]] = [set() for _ in range(ranks)]
    waiting[0].add(0)
    running: list[tuple[int, int, int]] = []  # (end, rank, micro-batch)
    idle = set(range(ranks))
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    held, peaks = [0] * ranks, [0] * ranks
    now = 0

    def fits(microbatch: int, rank: int) -> bool:
        stage, kind = path[done[microbatch]]
        deeper = chunks - 1 - stage // ranks
        return kind is Kind.B or held[rank] + 1 + deeper <= ranks * chunks

    while True:
        for rank in sorted(idle):
            microbatch = next((m for m in sorted(waiting[rank]) if fits(m, rank)), None)
            if microbatch is None:
                continue
            stage, kind = path[done[microbatch]]
            orders[rank].append(Action(stage, kind, microbatch))
            held[rank] += 1 if kind is Kind.F else -1
            peaks[rank] = max(peaks[rank], held[rank])
            waiting[rank].remove(microbatch)
            idle.remove(rank)
            heappush(running, (now + _TIME[kind], rank, microbatch))
            if done[microbatch] == 0 and microbatch + 1 < microbatches:
                waiting[0].add(microbatch + 1)
        if not running:
            break
        now = running[0][0]
        while running and running[0][0] == now:
            _, rank, microbatch = heappop(running)
            idle.add(rank)
            done[microbatch] += 1
            if done[microbatch] < len(path):
                waiting[placement.rank_of(path[done[microbatch]][0])].add(microbatch)
    return Plan("hanayo", placement, microbatches, tuple(map(tuple, orders)), tuple(peaks))
