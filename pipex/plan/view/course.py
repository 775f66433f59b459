"""What happens in a simulated step besides its actions and messages: waits, and what a rank holds when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipex.plan.actions import Kind
from pipex.plan.costs import Costs
from pipex.plan.messages import Message, Place
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, TimedAction


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
    """What a rank holds, as (time, amount from then on); begins with its weights, where the costs have them, at 0. Its
    maximum is ``Simulation.peak_memory``.

    An F adds when it starts, a backward changes when it ends: between the two a fused pair holds both.
    """
    held = costs.weights_held(plan.placement)[plan.placement.rank_of(row[0].action.each[0].stage)]
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
