"""The chain of actions, and hops between them, that makes a step as long as it is."""

from __future__ import annotations

from collections import defaultdict

from pipex.plan.costs import Costs
from pipex.plan.messages import Message, Place, messages
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation


def critical_path(plan: Plan, costs: Costs, simulation: Simulation) -> tuple[Place, ...]:
    """A critical path of ``simulation = simulate(plan, costs)`` as (rank, position) pairs, in the order of time.

    The first action on it starts when the step does, each later one when the one before it has ended, or one hop after
    that, or when copies to host memory and back are done that began then, and the last ends with the step. Where there
    is a choice, the path stays on its rank.
    """
    rows = simulation.timeline
    incoming: dict[Place, list[Message]] = defaultdict(list)
    for message in messages(plan, costs, simulation):
        incoming[message.consumer].append(message)

    def waited_for(rank: int, position: int) -> Place:
        action, start, _ = rows[rank][position]
        if position and rows[rank][position - 1].end == start:
            return rank, position - 1
        for message in incoming[rank, position]:
            if message.arrived == start:
                return message.producer
        if (before := _before_copies(simulation, rank, position, start)) is not None:
            return rank, before
        raise AssertionError(f"{action} on rank {rank} starts at {start} for no reason: not a simulation of this plan")

    rank = max(range(len(rows)), key=lambda r: rows[r][-1].end)
    path = [(rank, len(rows[rank]) - 1)]
    while rows[path[-1][0]][path[-1][1]].start > 0:
        path.append(waited_for(*path[-1]))
    return tuple(reversed(path))


def _before_copies(simulation: Simulation, rank: int, position: int, time: float) -> int | None:
    """The action of the rank with whose end the copies began, one after another, that ended at ``time``."""
    spans = [span for copy in simulation.copies[rank] for span in (copy[2:4], copy[4:6])]
    row = simulation.timeline[rank]
    while (begin := next((start for start, end in spans if end == time and start < end), None)) is not None:
        time = begin
        if (place := next((p for p in range(position - 1, -1, -1) if row[p].end == time), None)) is not None:
            return place
    return None
