"""Which plans train as one process does that updates at the end of a step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pipex
import pipex.plan as plans
from pipex.errors import PlanError

APART = {"pipedream", "pipedream-2bw", "forward-only"}
"""Weights that change within a step (``test_older_weights``), or no backward."""


def runnable(ranks: range, chunks: range, microbatches: Sequence[int]) -> list[tuple[str, int, int, int]]:
    """All (family, ranks, chunks, micro-batches) that are legal and not ``APART``."""
    cells = []
    for name in plans.FAMILIES:
        for cell in itertools.product([name], ranks, chunks, microbatches):
            if name not in APART and is_legal(*cell):
                cells.append(cell)
    return cells


def is_legal(name: str, ranks: int, chunks: int, microbatches: int) -> bool:
    try:
        pipex.build(name, ranks, microbatches, chunks=chunks)
    except PlanError:
        return False
    return True
