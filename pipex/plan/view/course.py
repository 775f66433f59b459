"""What happens in a simulated step besides its actions: messages, waits, and what a rank holds when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    edges = set(plan.edges)
    found = []
    for consumer, (stage, kind, microbatch, _) in ((place, part) for part, place in where.items()):
        if kind is Kind.W:
            continue
        source = stage - 1 if kind is Kind.F else stage + 1
        edge = Edge(source, stage, "activation" if kind is Kind.F else "gradient")
        if edge not in edges:  # the pipe begins here, or the tensor stays on the rank
            continue
        made_by = (Kind.F,) if kind is Kind.F else (Kind.I, Kind.B)
        producer = next(where[made] for k in made_by if (made := Action(source, k, microbatch)) in where)
        sent = _at(simulation, producer).end
        taken = _at(simulation, consumer).start
        found.append(Message(edge, microbatch, producer, consumer, sent, sent + costs.hop[edge], taken))
    return found


def _at(simulation: Simulation, place: Place) -> TimedAction:
    return simulation.timeline[place[0]][place[1]]


def waits(simulation: Simulation, under_way: Iterable[Message]) -> dict[Place, Message]:
    """Per action before which its rank was idle, the message that came last of those it needed."""
    last: dict[Place, Message] = {}
    for message in under_way:
        rank, position = message.consumer
        free = simulation.timeline[rank][position - 1].end if position else 0.0
        if message.taken > free:
            best = last.setdefault(message.consumer, message)
            if message.arrived > best.arrived:
                last[message.consumer] = message
    return last


def memory_curve(plan: Plan, costs: Costs, row: Sequence[TimedAction]) -> list[tuple[float, float]]:
    """What a rank holds, as (time, amount from then on); begins with (0, 0). Its maximum is ``Simulation.peak_memory``.

    An F adds when it starts, a backward changes when it ends: between the two a fused pair holds both.
    """
    held = 0.0
    curve = [(0.0, held)]
    for action, start, end in row:
        during = held
        for stage, kind, _, _ in action.each:
            match kind:
                case Kind.F:
                    held += costs.activation[stage]
                case Kind.I:
                    held += costs.deferred[stage] - costs.activation[stage]
                case Kind.B:
                    held -= costs.activation[stage]
                case Kind.W:
                    held -= costs.deferred[stage]
            if kind is Kind.F:
                during = max(during, held)
                if plan.update == "never":
                    held -= costs.activation[stage]
        for time, amount in ((start, during), (end, held)):
            if amount != curve[-1][1]:
                curve.append((time, amount))
    return curve


def under_way_curve(to_rank: Iterable[Message]) -> list[tuple[float, int]]:
    """How many of these messages are sent but not taken, as (time, number from then on); begins with (0, 0)."""
    changes = sorted(
        change
        for message in to_rank
        if message.taken > message.sent
        for change in ((message.sent, 1), (message.taken, -1))
    )
    count = 0
    curve = [(0.0, count)]
    for time, change in changes:
        count += change
        curve.append((time, count))
    return curve
