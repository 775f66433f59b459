"""What a rank holds, as its order changes it. That and the promise alone decide it; timing does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Literal, NamedTuple

from pipex.plan.actions import Action, Kind
from pipex.plan.costs import Costs
from pipex.plan.offload import away
from pipex.plan.plan import Plan


class Form(IntEnum):
    """What is held of one micro-batch at one stage."""

    INPUT = 0
    """the input alone, from F to I, where a stage is recomputed"""
    WHOLE = 1
    """the activation: from F to I, or while I computes it anew, or until and from when it is away"""
    DEFERRED = 2
    """what W needs, from I to W"""


class Change(NamedTuple):
    """What a rank holds changes by ``by`` all at once: (form, stage, more or fewer).

    Attributes:
        position: of the action that changes it, or before which it does.
        part: the first part of that action; of an activation that is gone or back, what made it, or needs it.
        when: "start" and "end" of the action, or before it: "gone" of an activation that was copied out, "back" of one
            for which room is made.
    """

    position: int
    part: Action
    when: Literal["start", "end", "gone", "back"]
    by: tuple[tuple[Form, int, int], ...]


def changes(plan: Plan, rank: int) -> Iterator[Change]:
    """In the order in which the rank holds more or less. What the parts of an OVERLAP_F_B hold, they hold beside each
    other: none frees anything before its end."""
    gone, back = defaultdict(list), defaultdict(list)
    for activation in away(plan, rank):
        if activation.gone < activation.back:
            gone[activation.gone].append(activation)
            back[activation.back].append(activation)
    for position, action in enumerate(plan.orders[rank]):
        for left in gone[position]:
            part = Action(left.stage, Kind.F, left.microbatch)
            yield Change(position, part, "gone", ((Form.WHOLE, left.stage, -1),))
        for came in back[position]:
            part = Action(came.stage, Kind.I, came.microbatch)
            yield Change(position, part, "back", ((Form.WHOLE, came.stage, 1),))
        first: list[tuple[Form, int, int]] = []
        last: list[tuple[Form, int, int]] = []
        for stage, kind, _, _ in action.each:
            if kind is Kind.F:
                first.append((Form.INPUT if stage in plan.recomputed else Form.WHOLE, stage, 1))
                if plan.update == "never":
                    last.append((Form.WHOLE, stage, -1))
            if kind in (Kind.I, Kind.B):
                if stage in plan.recomputed:
                    first += [(Form.INPUT, stage, -1), (Form.WHOLE, stage, 1)]
                last.append((Form.WHOLE, stage, -1))
            if kind is Kind.I:
                last.append((Form.DEFERRED, stage, 1))
            if kind is Kind.W:
                last.append((Form.DEFERRED, stage, -1))
        if first:
            yield Change(position, action.each[0], "start", tuple(first))
        if last:
            yield Change(position, action.each[0], "end", tuple(last))


def peak_memory(
    plan: Plan, activation: Sequence[float], deferred: Sequence[float], inputs: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Per rank the largest sum of what it holds at once, over all timings.

    Args:
        activation: per stage, what one micro-batch holds from the start of its F to the end of its I or B.
        deferred: per stage, what one micro-batch holds from the end of its I to the end of its W. Any unit; the
            result has the same.
        inputs: per stage, what is held of a micro-batch that is recomputed. None: nothing, as in the promise.
    """
    return tuple(peak_of(plan, rank, activation, deferred, inputs) for rank in range(plan.placement.ranks))


def peak_of(
    plan: Plan, rank: int, activation: Sequence[float], deferred: Sequence[float], inputs: Sequence[float] | None = None
) -> float:
    """That of one rank."""
    amounts = [0.0] * len(activation) if inputs is None else inputs, activation, deferred
    held = peak = 0.0
    for change in changes(plan, rank):
        held += sum(by * amounts[form][stage] for form, stage, by in change.by)
        peak = max(peak, held)
    return peak


def with_promise(plan: Plan, room: tuple[Costs, Sequence[float]] | None = None) -> Plan:
    """The same plan with the smallest promise that it keeps.

    Args:
        room: where something is offloaded, costs and per rank the memory that it may hold under them: its copies then
            have the most time, with the largest promise that keeps this.
    """
    ones, ranks = [1] * plan.placement.stages, range(plan.placement.ranks)
    smallest = replace(plan, peak_activations=(0,) * len(ranks))
    promises = [int(peak_of(smallest, rank, ones, ones)) for rank in ranks]
    if room is not None:
        costs, limit = room
        for rank in ranks:
            stages = plan.placement.stages_of(rank)
            each = min(max(costs.activation[s], costs.deferred[s]) for s in stages) or 1
            most = min(len(stages) * plan.microbatches, int(limit[rank] / each))
            for promise in range(most, promises[rank], -1):
                roomier = replace(plan, peak_activations=(promise,) * len(ranks))
                if peak_of(roomier, rank, costs.activation, costs.deferred, costs.inputs) <= limit[rank]:
                    promises[rank] = promise
                    break
    return replace(plan, peak_activations=tuple(promises))
