"""What is to be scheduled, in whole numbers, and orders as numbers in one block of bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, pairwise

from pipex.errors import InputError
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
        placement: which rank holds which stage. The native twin takes the stages of a pipe to follow each other by
            number, and two pipes to have one stage each on every rank.
        microbatches: micro-batches per step.
        forward, input_gradient, weight_gradient: per stage.
        activation_hop, gradient_hop: per stage but the last, the time of a message from it to the stage after it, and
            back; 0 where both stand on one rank, and where the second pipe begins.
        activation: per stage what one micro-batch holds from the start of its F to the end of its I.
        deferred: per stage what it holds from the end of its I to the end of its W.
        limit: per rank the most that it may hold.
        kept: per stage what one micro-batch holds from the start of its F to the start of its I, where that is less
            than ``activation``; empty: nowhere.
        passing: per pipe how many micro-batches pass it, those of the first pipe with the lower numbers; empty: all
            pass the only one.

    Raises:
        InputError: a tuple has another length, a number is negative, they are too large to be added up, or the pipes
            do not share the micro-batches.
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
    passing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.kept:
            object.__setattr__(self, "kept", self.activation)
        stages = self.placement.stages
        pipes, passing = len(self.placement.pipes), self.passing or (self.microbatches,)
        if len(passing) != pipes or sum(passing) != self.microbatches or min(passing) < 0:
            shares = f"{pipes} numbers with the sum {self.microbatches}"
            raise InputError("the pipes do not share the micro-batches", got=passing, needed=shares)
        for field in fields(self)[2:-1]:
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
    def microbatches_at(self) -> tuple[range, ...]:
        """Per stage the micro-batches that pass it."""
        ends = accumulate(self.passing or (self.microbatches,), initial=0)
        of_pipes = zip(self.placement.pipes, pairwise(ends), strict=True)
        return tuple(range(begin, end) for pipe, (begin, end) in of_pipes for _ in pipe)

    @cached_property
    def actions(self) -> int:
        """How many there are, on all ranks."""
        return len(self.durations) * len(self.placement.pipes[0]) * self.microbatches

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
        """What the busiest rank works for one micro-batch, in the mean over all: no schedule is faster for long."""
        work = [
            sum(times[stage] for times in self.durations) * len(at) for stage, at in enumerate(self.microbatches_at)
        ]
        return max(sum(work[stage] for stage in stages) for stages in self.stages_of) // self.microbatches

    @cached_property
    def lifetimes(self) -> tuple[int, ...]:
        """Per stage the time from F's start to I's end when nothing has to wait."""
        lifetimes = [0] * self.placement.stages
        for stage in reversed(range(self.placement.stages)):
            lifetimes[stage] = self.forward[stage] + self.input_gradient[stage]
            if (after := self.placement.after(stage)) is not None:
                lifetimes[stage] += self.activation_hop[stage] + self.gradient_hop[stage] + lifetimes[after]
        return tuple(lifetimes)


def pack(problem: Problem, orders: Orders) -> Packed:
    """The packed form of the orders of a valid plan. A B becomes I and W; UPDATEs, which take no time, are left out.
    With two pipes, micro-batches are numbered anew, as ``Problem.passing`` has them, and keep their order in each."""
    codes = array("q")
    number = _numbers(problem, orders)
    for order in orders:
        for action in (part for fused in order for part in fused.each):
            if action.kind is Kind.UPDATE:
                continue
            kinds = (Kind.I, Kind.W) if action.kind is Kind.B else (action.kind,)
            m = number[action.microbatch]
            codes.extend(code(problem, KINDS.index(kind), action.stage, m) for kind in kinds)
    return codes.tobytes()


def _numbers(problem: Problem, orders: Orders) -> dict[int, int]:
    """Per micro-batch of the orders its number in the problem."""
    parts = [part for order in orders for action in order for part in action.each if part.kind is Kind.F]
    numbers: dict[int, int] = {}
    for pipe in problem.placement.pipes:
        passing = sorted(part.microbatch for part in parts if part.stage == pipe[0])
        numbers |= zip(passing, problem.microbatches_at[pipe[0]], strict=True)
    return numbers


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
