"""When every action starts and ends, under given costs.

A rank starts an action as soon as the one before it has ended and the message it needs is there; a message is there
one hop after its producer's end. Communication costs nothing else. With these rules the figures of the Zero Bubble
paper (arXiv 2401.10241, table 5) come out to all printed digits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from pipex.errors import InputError
from pipex.plan.actions import Action, Kind
from pipex.plan.causality import RECEIVES, SENDS, causal_order, edge_of
from pipex.plan.communication import communicate
from pipex.plan.memory import peak_memory
from pipex.plan.plan import Edge, Plan


@dataclass(frozen=True)
class Costs:
    """What the actions of a plan cost. Times share one unit, memory another.

    Attributes:
        forward, input_gradient, weight_gradient: time of F, I, W per stage; B takes that of I and W together.
        hop: time per edge from the producer's end to the message's arrival.
        activation: memory per stage of one micro-batch from the start of F to the end of I or B.
        deferred: memory per stage of one micro-batch from the end of I to the end of W.
    """

    forward: Sequence[float]
    input_gradient: Sequence[float]
    weight_gradient: Sequence[float]
    hop: Mapping[Edge, float]
    activation: Sequence[float]
    deferred: Sequence[float]

    @staticmethod
    def uniform(
        plan: Plan,
        forward: float = 1.0,
        input_gradient: float = 1.0,
        weight_gradient: float = 1.0,
        hop: float = 0.0,
        activation: float = 1.0,
        deferred: float = 1.0,
    ) -> Costs:
        """The same costs for every stage and every edge. The default memory counts activations from F to W."""
        stages = plan.placement.stages
        return Costs(
            forward=[forward] * stages,
            input_gradient=[input_gradient] * stages,
            weight_gradient=[weight_gradient] * stages,
            hop=dict.fromkeys(plan.edges, hop),
            activation=[activation] * stages,
            deferred=[deferred] * stages,
        )

    def check(self, plan: Plan) -> None:
        """Raises InputError unless there is one finite cost, not below zero, per stage and edge of ``plan``."""
        stages = plan.placement.stages
        for name in ("forward", "input_gradient", "weight_gradient", "activation", "deferred"):
            values: Sequence[float] = getattr(self, name)
            if len(values) != stages:
                raise InputError(f"wrong number of costs {name}", got=len(values), needed=f"{stages}, one per stage")
            for stage, value in enumerate(values):
                _check_cost(f"{name} of stage {stage}", value)
        for edge in plan.edges:
            if edge not in self.hop:
                raise InputError(f"no hop cost for the {edge}", needed="one per edge of the plan")
            _check_cost(f"hop of the {edge}", self.hop[edge])


def _check_cost(name: str, value: float) -> None:
    if not (isfinite(value) and value >= 0):
        raise InputError(f"bad cost: {name}", got=value, needed="a finite number, at least 0")


class TimedAction(NamedTuple):
    """A compute action with its start and end, from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """The course of one step.

    Attributes:
        timeline: per rank its compute actions in order, with start and end.
        makespan: last end minus first start over all ranks.
        bubble_span: per rank the idle share between its first start and last end; the largest over the ranks. What a
            step without a barrier pays (arXiv 2401.10241, section 5.3).
        bubble_makespan: idle share of all ranks over the whole makespan. What a step with a barrier pays.
        peak_memory: per rank, in the unit of the costs.
        slots_used: per edge the most messages sent but not received at once. ``slots_needed`` is the bound over
            all timings.
    """

    timeline: tuple[tuple[TimedAction, ...], ...]
    makespan: float
    bubble_span: float
    bubble_makespan: float
    peak_memory: tuple[float, ...]
    slots_used: dict[Edge, int]


def simulate(plan: Plan, costs: Costs) -> Simulation:
    """Runs a valid plan under ``costs``.

    Raises:
        InputError: the costs do not fit the plan.
        DeadlockError: the ranks wait for each other for ever.
    """
    costs.check(plan)
    duration = {
        Kind.F: costs.forward,
        Kind.I: costs.input_gradient,
        Kind.W: costs.weight_gradient,
        Kind.B: [i + w for i, w in zip(costs.input_gradient, costs.weight_gradient, strict=True)],
    }
    now = [0.0] * plan.placement.ranks
    sent: dict[Edge, list[float]] = defaultdict(list)
    received: dict[Edge, list[float]] = defaultdict(list)
    timeline: list[list[TimedAction]] = [[] for _ in now]
    for rank, _, action in causal_order(communicate(plan), plan.placement):
        if action.kind in SENDS:
            sent[edge_of(action)].append(now[rank])
        elif action.kind in RECEIVES:
            edge = edge_of(action)
            arrival = sent[edge][len(received[edge])] + costs.hop[edge]
            now[rank] = max(now[rank], arrival)
            received[edge].append(now[rank])
        else:
            start = now[rank]
            now[rank] += duration[action.kind][action.stage]
            timeline[rank].append(TimedAction(action, start, now[rank]))
    busy = [sum(end - start for _, start, end in row) for row in timeline]
    span = [row[-1].end - row[0].start for row in timeline]
    makespan = max(row[-1].end for row in timeline) - min(row[0].start for row in timeline)
    return Simulation(
        timeline=tuple(map(tuple, timeline)),
        makespan=makespan,
        bubble_span=max(_idle_share(b, s) for b, s in zip(busy, span, strict=True)),
        bubble_makespan=_idle_share(sum(busy), len(busy) * makespan),
        peak_memory=peak_memory(plan, costs.activation, costs.deferred),
        slots_used={edge: _most_under_way(sent[edge], received[edge]) for edge in plan.edges},
    )


def _idle_share(busy: float, total: float) -> float:
    return 1 - busy / total if total else 0.0


def _most_under_way(sent: list[float], received: list[float]) -> int:
    """Message k shares the ring with those sent before it that are not received when it is sent."""
    return max(k + 1 - min(k, bisect_right(received, time)) for k, time in enumerate(sent))
