"""Orders written as the papers draw them: a row of actions, repeated so and so often, then the next row.

A row names an action by its kind and by which of the rank's two stages it works on: ``F0 I0 W0 F1 I1 W1``. Two that run
as one are joined by ``&``: ``F0&B1``. F, and I or B, take the next micro-batch of the stage, W the oldest that I left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import count

from pipex.plan.actions import NONE, Action, Kind

Phase = tuple[str, int]
"""A row, and how many times in turn it is run."""


def in_phases(phases: Iterable[Phase], stages: tuple[int, int], first: tuple[int, int] = (0, 0)) -> tuple[Action, ...]:
    """The order of a rank whose stages 0 and 1 in the rows are ``stages``; their micro-batches count from ``first``."""
    forwards, backwards = list(map(count, first)), list(map(count, first))
    deferred: tuple[deque[int], ...] = (deque(), deque())

    def simple(name: str) -> Action:
        kind, stage = Kind(name[0]), int(name[1])
        if kind is Kind.F:
            microbatch = next(forwards[stage])
        elif kind is Kind.W:
            microbatch = deferred[stage].popleft()
        else:
            microbatch = next(backwards[stage])
            if kind is Kind.I:
                deferred[stage].append(microbatch)
        return Action(stages[stage], kind, microbatch)

    def action(cell: str) -> Action:
        parts = tuple(map(simple, cell.split("&")))
        return parts[0] if len(parts) == 1 else Action(NONE, Kind.OVERLAP_F_B, NONE, parts)

    return tuple(action(cell) for row, times in phases for _ in range(times) for cell in row.split())
