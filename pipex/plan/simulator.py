"""When every action starts and ends, under given costs.

A rank starts an action as soon as the one before it has ended and the message it needs is there; a message is there
one hop after its producer's end. Communication costs nothing else. With these rules the figures of the Zero Bubble
paper (arXiv 2401.10241, table 5) come out to all printed digits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from pipex.plan.actions import Action, Kind
from pipex.plan.causality import RECEIVES, SENDS, causal_order, edge_of
from pipex.plan.communication import communicate
from pipex.plan.costs import Costs
from pipex.plan.memory import peak_memory
from pipex.plan.placement import Edge
from pipex.plan.plan import Plan


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
            takes = sum(duration[part.kind][part.stage] for part in action.each)
            now[rank] += takes * costs.overlap if action.parts else takes
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
