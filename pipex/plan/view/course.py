"""What happens in a simulated step besides its actions and messages: waits, and what a rank holds when."""

from __future__ import annotations

from collections.abc import Iterable

from pipex.plan.costs import Costs
from pipex.plan.memory import changes
from pipex.plan.messages import Message, Place
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation


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


def memory_curve(plan: Plan, costs: Costs, simulation: Simulation, rank: int) -> list[tuple[float, float]]:
    """What a rank holds, as (time, amount from then on); begins with its weights, where the costs have them, at 0. Its
    maximum is ``Simulation.peak_memory``, or less where copies end before they have to.

    An F adds when it starts, a backward changes when it ends: between the two a fused pair holds both. An activation
    that was copied out is gone with the copy's end, and takes its room again when the copy back starts.
    """
    row = simulation.timeline[rank]
    copies = {(copy.stage, copy.microbatch): copy for copy in simulation.copies[rank]}
    amounts = costs.inputs or [0.0] * plan.placement.stages, costs.activation, costs.deferred
    timed = []
    for change in changes(plan, rank):
        match change.when:
            case "start":
                time = row[change.position].start
            case "end":
                time = row[change.position].end
            case "gone":
                time = copies[change.part.stage, change.part.microbatch].out_end
            case "back":
                time = copies[change.part.stage, change.part.microbatch].back_start
        timed.append((time, change.by))
    held = costs.weights_held(plan.placement)[rank]
    curve = [(0.0, held)]
    for time, by in sorted(timed, key=lambda pair: pair[0]):
        held += sum(more * amounts[form][stage] for form, stage, more in by)
        if held != curve[-1][1]:
            curve.append((time, held))
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
