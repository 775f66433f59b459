"""Orders of a made-up plan, for worlds that tests open without a pipeline."""

from __future__ import annotations

from pipex.plan.actions import Action, Kind


def forwards(ranks: int, count: int = 10) -> list[list[Action]]:
    """Stage r on rank r; at position p it runs the forward of micro-batch p."""
    return [[Action(rank, Kind.F, microbatch) for microbatch in range(count)] for rank in range(ranks)]
