"""The messages of a simulated step."""

from __future__ import annotations

from typing import NamedTuple

from pipex.plan.actions import Action, Kind
from pipex.plan.costs import Costs
from pipex.plan.placement import Edge
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, TimedAction

Place = tuple[int, int]
"""(rank, position in its order)"""


class Message(NamedTuple):
    """One tensor on its way between two ranks; times as in the simulation.

    Attributes:
        edge: the link it takes.
        microbatch: what it belongs to.
        producer, consumer: the actions at its two ends.
        sent: the producer's end.
        arrived: one hop later.
        taken: the consumer's start.
    """

    edge: Edge
    microbatch: int
    producer: Place
    consumer: Place
    sent: float
    arrived: float
    taken: float


def messages(plan: Plan, costs: Costs, simulation: Simulation) -> list[Message]:
    """All messages of a simulated step, in the order of rank and position of their consumers."""
    where = {
        part: (rank, position)
        for rank, row in enumerate(simulation.timeline)
        for position, timed in enumerate(row)
        for part in timed.action.each
    }
    ends = plan.placement.ends
    found = []
    for consumer, (stage, kind, microbatch, _) in ((place, part) for part, place in where.items()):
        if kind in (Kind.W, Kind.UPDATE):
            continue
        edge = ends.get((stage, Kind.RECV_F if kind is Kind.F else Kind.RECV_B))
        if edge is None:  # the pipe begins here, or the tensor stays on the rank
            continue
        made_by = (Kind.F,) if kind is Kind.F else (Kind.I, Kind.B)
        producer = next(where[made] for k in made_by if (made := Action(edge.source, k, microbatch)) in where)
        sent = _at(simulation, producer).end
        taken = _at(simulation, consumer).start
        found.append(Message(edge, microbatch, producer, consumer, sent, sent + costs.hop[edge], taken))
    return found


def _at(simulation: Simulation, place: Place) -> TimedAction:
    return simulation.timeline[place[0]][place[1]]
