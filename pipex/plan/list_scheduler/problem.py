"""What is to be scheduled, in whole numbers, and orders as numbers in one block of bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from pipex.errors import InputError, PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.placement import Placement
from pipex.plan.plan import Orders

KINDS = (Kind.F, Kind.I, Kind.W)
"""The kinds of a split backward, as they are numbered in packed orders; ties between due dates are broken so."""

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(3)

Packed = bytes
"""Orders in one block: all actions of rank 0 in order, then those of rank 1, and so on, each a 64-bit integer
``(kind × stages + stage) × microbatches + microbatch``, its kind an index of ``KINDS``."""

_LARGEST = 2**56
"""No sum of times or of memory may exceed it, so that the native twin's 64 bits hold thousandths of them."""


@dataclass(frozen=True)
class Problem:
    """Sizes, times and memory of one pipeline. Times are whole numbers of one unit, memory of another.

    Attributes:
        placement: which rank holds which stage; one pipe, whose stages the native twin takes to follow each other by
            number.
        microbatches: micro-batches per step.
        forward, input_gradient, weight_gradient: per stage.
        activation_hop, gradient_hop: per stage but the last, the time of a message from it to the stage after it, and
            back; 0 where both stand on one rank.
        activation: per stage what one micro-batch holds from the start of its F to the end of its I.
        deferred: per stage what it holds from the end of its I to the end of its W.
        limit: per rank the most that it may hold.
        kept: per stage what one micro-batch holds from the start of its F to the start of its I, where that is less
            than ``activation``; empty: nowhere.

    Raises:
        InputError: a tuple has another length, a number is negative, or they are too large to be added up.
        PlanError: the placement has two pipes.
    """

    placement: Placement
    microbatches: int
    forward: tuple[int, ...]
    input_gradient: tuple[int, ...]
    weight_gradient: tuple[int, ...]
    activation_hop: tuple[int, ...]
    gradient_hop: tuple[int, ...]
    activation: tuple[int, ...]
    deferred: tuple[int, ...]
    limit: tuple[int, ...]
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.kept:
            object.__setattr__(self, "kept", self.activation)
        stages = self.placement.stages
        if len(self.placement.pipes) != 1:
            raise PlanError("the list scheduler cannot place two copies of a model", got=self.placement.name)
        for field in fields(self)[2:]:
            values: tuple[int, ...] = getattr(self, field.name)
            needed = {"activation_hop": stages - 1, "gradient_hop": stages - 1, "limit": self.placement.ranks}
            if len(values) != needed.get(field.name, stages):
                needed_ = needed.get(field.name, stages)
                raise InputError(f"wrong number of values for {field.name}", got=len(values), needed=needed_)
            if (least := min(values, default=0)) < 0:
                raise InputError(f"bad value for {field.name}", got=least, needed="whole numbers, at least 0")
            if (total := sum(values) * self.microbatches) > _LARGEST:
                raise InputError(f"{field.name} is too large", got=total, needed=_LARGEST, fix="take a larger unit")

    @cached_property
    def durations(self) -> tuple[tuple[int, ...], ...]:
        """The times of F, I and W, per stage."""
        return self.forward, self.input_gradient, self.weight_gradient

    @cached_property
    def charge(self) -> tuple[int, ...]:
        """Per stage what an F has to find free: the larger of activation and deferred, so that its I never waits; or
        what is kept, where that is less than an activation."""
        each = zip(self.kept, self.activation, self.deferred, strict=True)
        return tuple(kept if kept < activation else max(activation, deferred) for kept, activation, deferred in each)

    @cached_property
    def surge(self) -> tuple[int, ...]:
        """Per stage what an I has to find free besides, for itself and the W that follows."""
        each = zip(self.activation, self.deferred, self.charge, strict=True)
        return tuple(max(activation, deferred) - charge for activation, deferred, charge in each)

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """Per stage its rank."""
        return tuple(map(self.placement.rank_of, range(self.placement.stages)))

    @cached_property
    def stages_of(self) -> tuple[tuple[int, ...], ...]:
        """Per rank its stages, rising."""
        return tuple(map(self.placement.stages_of, range(self.placement.ranks)))

    @cached_property
    def interval(self) -> int:
        """What the busiest rank works for one micro-batch: no schedule finishes them faster for long."""
        return max(sum(times[stage] for times in self.durations for stage in stages) for stages in self.stages_of)

    @cached_property
    def lifetimes(self) -> tuple[int, ...]:
        """Per stage the time from F's start to I's end when nothing has to wait."""
        lifetimes: list[int] = []
        hops = [*map(sum, zip(self.activation_hop, self.gradient_hop, strict=True)), 0]
        for forward, input_gradient, hop in reversed([*zip(self.forward, self.input_gradient, hops, strict=True)]):
            lifetimes.append(forward + input_gradient + hop + (lifetimes[-1] if lifetimes else 0))
        return tuple(lifetimes[::-1])


def pack(problem: Problem, orders: Orders) -> Packed:
    """The packed form of the orders of a valid plan. A B becomes I and W; UPDATEs, which take no time, are left out."""
    codes = array("q")
    for order in orders:
        for action in (part for fused in order for part in fused.each):
            if action.kind is Kind.UPDATE:
                continue
            kinds = (Kind.I, Kind.W) if action.kind is Kind.B else (action.kind,)
            codes.extend(code(problem, KINDS.index(kind), action.stage, action.microbatch) for kind in kinds)
    return codes.tobytes()


def unpack(problem: Problem, packed: Packed) -> Orders:
    """The orders whose packed form this is."""
    stages, microbatches = problem.placement.stages, problem.microbatches
    action = [
        Action(stage, kind, microbatch)
        for kind in KINDS
        for stage in range(stages)
        for microbatch in range(microbatches)
    ]
    return tuple(tuple(action[code] for code in row) for row in rows(problem, packed))


def code(problem: Problem, kind: int, stage: int, microbatch: int) -> int:
    """One action as it stands in packed orders."""
    return (kind * problem.placement.stages + stage) * problem.microbatches + microbatch


def rows(problem: Problem, packed: Packed) -> list[Sequence[int]]:
    """Per rank its actions as numbers."""
    codes = array("q", packed)
    length = len(codes) // problem.placement.ranks
    return [codes[start : start + length] for start in range(0, len(codes), length)]
