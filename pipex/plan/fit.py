"""Fits a model to a plan: the cut that keeps the memory limits and makes the simulated step shortest.

The bottleneck decides how long a step takes when there are many micro-batches; with few, filling and emptying the
pipeline counts as much, and what is best there depends on the order of the actions. So the cuts with a small bottleneck
are only where the search starts: single layers are then moved between neighbours while the simulated makespan falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, isfinite
from operator import le, mul

from pipex.errors import InputError
from pipex.plan.costs import Costs
from pipex.plan.cut import Block, MemoryUse, TooLittleMemory, cuts, held_blocks, loads
from pipex.plan.layer_costs import LayerCosts
from pipex.plan.memory import Form, changes
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, simulate

STATE = 4.0
"""Bytes kept per byte of parameters: weights, gradients and Adam's two moments, all in one type."""

BUDGET = 200_000
"""simulated actions, in all; about a second"""


@dataclass(frozen=True)
class Fit:
    """A model cut for a plan.

    Attributes:
        counts: layers per stage in stage order (of one pipe under ``bidirectional``).
        costs: the stages' costs, in seconds and bytes.
        simulation: the step under these costs.
        bottleneck: the largest sum of F, I and W of a rank for one micro-batch, in seconds.
        bound: no cut has a smaller bottleneck.
        memory: bytes per rank: parameters with their state, and activations at their peak.
    """

    counts: tuple[int, ...]
    costs: Costs
    simulation: Simulation
    bottleneck: float
    bound: float
    memory: tuple[float, ...]


def fit(costs: LayerCosts, plan: Plan, *, memory: float | Sequence[float] | None = None, state: float = STATE) -> Fit:
    """Cuts the layers for ``plan``. The same cut on every machine.

    Args:
        memory: bytes that a rank has for parameters and activations: one number or one per rank; None: no limit.
        state: bytes kept per byte of parameters, with gradients and optimizer.

    Raises:
        InputError: fewer layers than stages, a number out of range, or no cut is found that keeps the limits (where
            every rank has one stage: there is none); says which limits would do.
    """
    placement = plan.placement
    need = _Memory(costs, plan, state)
    limits = None if memory is None else _limits(memory, placement.ranks)
    share: MemoryUse | None = None if limits is None else lambda rank, blocks: need(rank, blocks) / limits[rank]
    try:
        starts = list(cuts(costs.times, placement, share))
    except TooLittleMemory as error:
        assert limits is not None
        raise InputError(
            "no cut of the model keeps the memory limit" + ("" if error.proven else ", as far as was searched"),
            got=_bytes(limits),
            needed=f"at least {_bytes([ceil(limit * error.factor) for limit in limits])}",
            fix="allow more memory, use more ranks, or a plan that holds fewer micro-batches",
        ) from None
    counts, simulation = _judge(costs, plan, [start.counts for start in starts], share)
    return Fit(
        counts=counts,
        costs=costs.of(placement, counts),
        simulation=simulation,
        bottleneck=max(loads(costs.times, placement, counts)),
        bound=starts[0].bound,
        memory=tuple(need(rank, blocks) for rank, blocks in enumerate(held_blocks(placement, counts))),
    )


def _limits(memory: float | Sequence[float], ranks: int) -> tuple[float, ...]:
    limits = tuple(memory) if isinstance(memory, Sequence) else (memory,) * ranks
    if len(limits) != ranks:
        raise InputError("wrong number of memory limits", got=len(limits), needed=f"1 or {ranks}, one per rank")
    for rank, limit in enumerate(limits):
        if not (isfinite(limit) and limit > 0):
            raise InputError(f"bad memory limit of rank {rank}", got=limit, needed="a finite number of bytes above 0")
    return limits


def _bytes(limits: Sequence[float]) -> str:
    each = [f"{limit:.12g}" for limit in limits]
    return f"{each[0] if len(set(each)) == 1 else ', '.join(each)} bytes per rank"


def _judge(
    costs: LayerCosts, plan: Plan, starts: Sequence[tuple[int, ...]], share: MemoryUse | None
) -> tuple[tuple[int, ...], Simulation]:
    """From the best start, moves layers between neighbours while the simulated makespan falls."""
    placement = plan.placement
    simulated = [(simulate(plan, costs.of(placement, start)), start) for start in dict.fromkeys(starts)]
    best, counts = min(simulated, key=lambda pair: pair[0].makespan)
    left = BUDGET // sum(map(len, plan.orders)) - len(simulated)
    moves = [pair for stage in range(len(counts) - 1) for pair in ((stage, stage + 1), (stage + 1, stage))]
    at = since = 0
    while since < len(moves) and left > 0:
        source, target = moves[at]
        at, since = (at + 1) % len(moves), since + 1
        after = tuple(n - (stage == source) + (stage == target) for stage, n in enumerate(counts))
        if after[source] == 0 or not _fits(placement, after, share):
            continue
        left -= 1
        simulation = simulate(plan, costs.of(placement, after))
        if simulation.makespan < best.makespan:
            counts, best, since = after, simulation, 0
    return counts, best


def _fits(placement: Placement, counts: Sequence[int], share: MemoryUse | None) -> bool:
    return share is None or all(share(rank, b) <= 1 for rank, b in enumerate(held_blocks(placement, counts)))


class _Memory:
    """(rank, its blocks in stage order) -> the bytes that it needs at its fullest moment; exact, as ``peak_memory``."""

    def __init__(self, costs: LayerCosts, plan: Plan, state: float) -> None:
        if not (isfinite(state) and state >= 1):
            raise InputError("bad state", got=state, needed="at least 1 byte kept per byte of parameters")
        self._layers = costs.layers
        self._parameters = list(accumulate((layer.parameters for layer in costs.layers), initial=0.0))
        self._activation = list(accumulate((layer.activation for layer in costs.layers), initial=0.0))
        self._deferred = list(accumulate((layer.deferred for layer in costs.layers), initial=0.0))
        self._state = [state + versions - 1 for versions in plan.weight_versions]
        self._moments = [_moments(plan, rank) for rank in range(plan.placement.ranks)]

    def __call__(self, rank: int, blocks: Sequence[Block]) -> float:
        parameters = 0.0
        each: list[float] = []
        for begin, end in blocks:
            parameters += self._parameters[end] - self._parameters[begin]
            activation = self._activation[end] - self._activation[begin]
            if end < len(self._layers):
                activation += self._layers[end - 1].output
            deferred = self._deferred[end] - self._deferred[begin]
            each += self._layers[begin - 1].output if begin else self._layers[0].activation, activation, deferred
        peak: float = max(sum(map(mul, moment, each)) for moment in self._moments[rank])
        return parameters * self._state[rank] + peak


def _moments(plan: Plan, rank: int) -> list[tuple[int, ...]]:
    """The moments at which the rank may be fullest, as numbers of micro-batches: for each of its stages those of which
    it holds each form. Which of them is the fullest depends on the bytes."""
    place = {stage: len(Form) * index for index, stage in enumerate(plan.placement.stages_of(rank))}
    held = [0] * (len(Form) * len(place))
    moments = set()
    for change in changes(plan, rank):
        for form, stage, more in change.by:
            held[place[stage] + form] += more
        if any(more > 0 for _, _, more in change.by):
            moments.add(tuple(held))
    return [m for m in moments if not any(m != other and all(map(le, m, other)) for other in moments)]
