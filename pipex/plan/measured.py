"""A real run in the terms of a simulated one: one of its steps, and what its actions cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from pipex.errors import InputError
from pipex.events import Event
from pipex.plan.actions import COMPUTE, IN_ORDERS, Action, Kind
from pipex.plan.bubbles import bubbles, busy_times
from pipex.plan.communication import unfused
from pipex.plan.costs import Costs
from pipex.plan.plan import Plan
from pipex.plan.simulator import TimedAction

_IN_ORDERS = {kind.value for kind in IN_ORDERS}


@dataclass(frozen=True)
class MeasuredStep:
    """One step of a run of a plan; times in seconds from its first start.

    Attributes:
        number: which step it was.
        of: how many were measured.
        timeline: as in ``Simulation``.
        makespan, span, bubble_span, bubble_makespan: as of ``Bubbles``.
    """

    number: int
    of: int
    timeline: tuple[tuple[TimedAction, ...], ...]
    makespan: float
    span: float
    bubble_span: float
    bubble_makespan: float


def typical_step(plan: Plan, ranks: Sequence[Iterable[Event]]) -> MeasuredStep:
    """The measured step whose makespan is the median (the lower one of an even number).

    Args:
        ranks: per rank its events, of one or several whole steps.

    Raises:
        InputError: the events are not those of this plan; names step, rank, position and action.
    """
    if len(ranks) != plan.placement.ranks:
        raise InputError("the trace is of another number of ranks", got=len(ranks), needed=plan.placement.ranks)
    steps: dict[int, list[list[TimedAction]]] = defaultdict(lambda: [[] for _ in ranks])
    for rank, events in enumerate(ranks):
        for event in events:
            if event.kind in _IN_ORDERS:
                action = Action(event.stage, Kind(event.kind), event.microbatch)
                steps[event.step][rank].append(TimedAction(action, event.begin / 1e9, event.end / 1e9))
    if not steps:
        raise InputError("the trace holds no step", needed="one made by pipex train --trace")
    orders = unfused(plan).orders
    measured = []
    for number, rows in steps.items():
        for rank, (row, order) in enumerate(zip(rows, orders, strict=True)):
            _check_order(number, rank, [timed.action for timed in row], order)
        measured.append(_measured(number, len(steps), rows))
    typical = median_low(step.makespan for step in measured)
    return next(step for step in measured if step.makespan == typical)


def _check_order(step: int, rank: int, ran: list[Action], order: Sequence[Action]) -> None:
    for position, (got, needed) in enumerate(zip(ran, order, strict=False)):
        if got != needed:
            problem = f"the trace is of another plan: step {step}, rank {rank} at position {position}"
            raise InputError(problem, got=got, needed=needed)
    if len(ran) != len(order):
        problem = f"the trace is of another plan: step {step}, rank {rank}"
        raise InputError(problem, got=f"{len(ran)} actions", needed=len(order))


def _measured(number: int, of: int, rows: list[list[TimedAction]]) -> MeasuredStep:
    zero = min(row[0].start for row in rows)
    timeline = tuple(tuple(TimedAction(a, start - zero, end - zero) for a, start, end in row) for row in rows)
    return MeasuredStep(
        number=number,
        of=of,
        timeline=timeline,
        **bubbles([busy_times([(start, end) for _, start, end in row]) for row in timeline])._asdict(),
    )


def measured_costs(plan: Plan, action: Mapping[tuple[str, int], float], hop: float, overlap: float = 1.0) -> Costs:
    """The plan's costs in seconds from a measured run of it, memory in micro-batches of a whole rank.

    Args:
        action: time of one action by (kind, stage), as ``pipex.observe.Figures.action`` has it. A B whose parts were
            never measured apart counts as I, and so does a W that was made with its I.
        hop: time of one message, the same on all edges.
        overlap: as of ``Costs``; ``Figures.overlap`` of a run whose pairs ran at once.

    Raises:
        InputError: a kind that the plan runs was not measured; names it and the stage.
    """
    planned = {(part.kind, part.stage) for order in unfused(plan).orders for part in order if part.kind in COMPUTE}
    for kind, stage in sorted(planned, key=lambda key: (key[1], key[0].value)):
        if (kind.value, stage) not in action:
            raise InputError(f"no measured time of {kind.value} on stage {stage}", needed="a trace of this plan")
    stages = range(plan.placement.stages)
    share = [1 / (plan.placement.chunks // len(plan.placement.pipes))] * plan.placement.stages
    return Costs(
        forward=[action.get(("F", s), 0.0) for s in stages],
        input_gradient=[action.get(("I", s), action.get(("B", s), 0.0)) for s in stages],
        weight_gradient=[action.get(("W", s), 0.0) for s in stages],
        hop=dict.fromkeys(plan.edges, hop),
        activation=share,
        deferred=share,
        recompute=[0.0] * len(share),  # in the times of I and B, as they were measured
        overlap=overlap,
    )
