"""The chain of actions, and hops between them, that makes a step as long as it is."""

from __future__ import annotations

from collections.abc import Iterator

from pipex.plan.actions import Action, Kind
from pipex.plan.costs import Costs
from pipex.plan.placement import Edge
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation


def critical_path(plan: Plan, costs: Costs, simulation: Simulation) -> tuple[tuple[int, int], ...]:
    """A critical path of ``simulation = simulate(plan, costs)`` as (rank, position) pairs, in the order of time.

    The first action on it starts when the step does, each later one when the one before it has ended, or one hop after
    that, and the last ends with the step. Where there is a choice, the path stays on its rank.
    """
    rows = simulation.timeline
    where = {
        part: (rank, position)
        for rank, row in enumerate(rows)
        for position, timed in enumerate(row)
        for part in timed.action.each
    }

    def waited_for(rank: int, position: int) -> tuple[int, int]:
        action, start, _ = rows[rank][position]
        if position and rows[rank][position - 1].end == start:
            return rank, position - 1
        for maker, edge in _messages(action):
            if maker in where and edge in plan.edges:
                place = where[maker]
                if rows[place[0]][place[1]].end + costs.hop[edge] == start:
                    return place
        raise AssertionError(f"{action} on rank {rank} starts at {start} for no reason: not a simulation of this plan")

    rank = max(range(len(rows)), key=lambda r: rows[r][-1].end)
    path = [(rank, len(rows[rank]) - 1)]
    while rows[path[-1][0]][path[-1][1]].start > 0:
        path.append(waited_for(*path[-1]))
    return tuple(reversed(path))


def _messages(action: Action) -> Iterator[tuple[Action, Edge]]:
    """What the action may need from another rank: the action that makes it, and the edge on which it comes."""
    for stage, kind, microbatch, _ in action.each:
        if kind is Kind.F:
            yield Action(stage - 1, Kind.F, microbatch), Edge(stage - 1, stage, "activation")
        elif kind in (Kind.I, Kind.B):
            for maker in (Kind.I, Kind.B):
                yield Action(stage + 1, maker, microbatch), Edge(stage + 1, stage, "gradient")
