"""Which plans the runtime executes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pipex
import pipex.plan as plans
from pipex.errors import PlanError

NOT_RUN = {"pipedream", "pipedream-2bw", "forward-only"}
"""Older weights, or no backward: planned and simulated only."""


def runnable(ranks: range, chunks: range, microbatches: Sequence[int]) -> list[tuple[str, int, int, int]]:
    """All (family, ranks, chunks, micro-batches) that are legal and that the runtime executes."""
    cells = []
    for name in plans.FAMILIES:
        for cell in itertools.product([name], ranks, chunks, microbatches):
            if name not in NOT_RUN and is_legal(*cell):
                cells.append(cell)
    return cells


def is_legal(name: str, ranks: int, chunks: int, microbatches: int) -> bool:
    try:
        pipex.build(name, ranks, microbatches, chunks=chunks)
    except PlanError:
        return False
    return True
