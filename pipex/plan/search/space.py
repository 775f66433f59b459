"""The placements that a search looks at."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from math import inf

from pipex.errors import InputError
from pipex.plan.bounds import SLACK, Bound, Spare, check_limit, makespan_bound, smallest_memory, span_bound
from pipex.plan.costs import CostModel, Costs
from pipex.plan.list_scheduler import Problem
from pipex.plan.list_scheduler.improvement import Objective
from pipex.plan.placement import Placement
from pipex.plan.search.rules import Pool
from pipex.plan.search.units import Units, with_medians
from pipex.plan.versions import Update


class Space:
    """All plans on one placement; with two copies of the model, those that share the micro-batches in one way.

    Attributes:
        passing: per pipe the number of micro-batches that pass it.
        costs: the true costs.
        limit: per rank the memory that plans may have, in the unit of the costs; None: any.
        weights: per rank the memory of all its weights.
        whole_limit: what the limit leaves for activations, in whole numbers.
        exchange: the time after the last action in which the copies add up their gradients, in whole numbers.
        problem: the costs for the list scheduler.
        family: the name under which plans by due dates go here; empty where the search makes none.
        median_problem: the problem with median times; None where these are the true ones.
        pool: the rules tried here.
        recomputed, offloaded: the stages of its plans that are.
    """

    def __init__(
        self,
        placement: Placement,
        passing: tuple[int, ...],
        costs: Costs,
        limit: Sequence[float] | None,
        units: Units,
        recomputed: tuple[int, ...] = (),
        offloaded: tuple[int, ...] = (),
    ) -> None:
        self.placement, self.passing, self.costs, self.limit = placement, passing, costs, limit
        self.microbatches, self.copies = sum(passing), len(placement.pipes)
        self.units, self.recomputed, self.offloaded = units, recomputed, offloaded
        self.whole_limit = units.limits(placement, self.microbatches, costs, limit)
        self.problem = units.problem(placement, self.microbatches, costs, limit, passing, recomputed, offloaded)
        self.weights = costs.weights_held(placement)
        (self.exchange,) = units.times([costs.exchange if self.copies > 1 else 0.0])
        loop = "interleaved-zb" if placement.chunks > 1 else "zb-auto"
        self.family = {"loop": loop, "v": "zbv", "bidirectional": "dualpipe"}.get(placement.name, "")
        self.median_problem: Problem | None = None
        plain = not (recomputed or offloaded)  # of mixed times there is no median
        if plain and (medians := with_medians(self.problem)) != self.problem:
            self.median_problem = medians
        self.pool = Pool()
        self.bound = cache(self._bound)

    @property
    def activations(self) -> list[float]:
        """What the limit leaves for activations, in the unit of the costs."""
        limits = [inf] * self.placement.ranks if self.limit is None else self.limit
        return [most - held for most, held in zip(limits, self.weights, strict=True)]

    def sparing(self, recomputed: tuple[int, ...], offloaded: tuple[int, ...]) -> Space:
        """The same placement, with these stages recomputed and offloaded."""
        return Space(self.placement, self.passing, self.costs, self.limit, self.units, recomputed, offloaded)

    def least(self, objective: Objective, update: Update, spare: Collection[Spare]) -> Bound:
        """What no plan on this placement can go below, whichever stages it spares."""
        of = makespan_bound if objective == "makespan" else span_bound
        return of(self.placement, self.microbatches, self.costs, self.limit, update, spare)

    def _bound(self, objective: Objective, update: Update = "step", whole_backward: bool = False) -> Bound:
        """What no plan here can go below, or none whose backwards are all B; infinite where none keeps the limit."""
        of = makespan_bound if objective == "makespan" else span_bound
        costs = self.costs.spared(self.recomputed, self.offloaded)
        if whole_backward:
            i_and_w = [i + w for i, w in zip(costs.input_gradient, costs.weight_gradient, strict=True)]
            nothing = [0.0] * len(i_and_w)
            costs = replace(costs, input_gradient=i_and_w, weight_gradient=nothing, deferred=nothing)
        try:
            return of(self.placement, self.microbatches, costs, self.limit, update)
        except InputError as error:
            return Bound(inf, str(error))


def spaces_of(
    costs: CostModel,
    ranks: int,
    microbatches: int,
    chunks: int,
    limit: Sequence[float] | None,
    spare: Collection[Spare],
) -> tuple[Units, list[Space]]:
    """All placements of at most ``chunks`` chunks that the costs fit and that have plans within the limit, some of
    whose stages may be spared. Where there are none that spare nothing, the space of these is empty. Two copies of a
    model take an even number of ranks, as no rank is to hold the same layers twice, and a micro-batch each.

    Raises:
        InputError: there is none; says why, for a limit how much is needed.
    """
    placements = [Placement("loop", ranks, v) for v in range(1, chunks + 1)]
    if chunks > 1:
        placements.append(Placement("v", ranks, 2))
        if ranks % 2 == 0 and microbatches > 1:
            placements.append(Placement("bidirectional", ranks, 2))
        placements += [Placement("wave", ranks, v) for v in range(2, chunks + 1, 2)]
    fitting: dict[Placement, Costs] = {}
    misfits: list[InputError] = []
    for placement in placements:
        try:
            fitting[placement] = costs.on(placement)
        except InputError as error:
            misfits.append(error)
    if not fitting:
        raise misfits[0]
    if limit is not None:
        too_small: list[tuple[float, InputError]] = []
        for placement, priced in list(fitting.items()):
            try:
                check_limit(placement, priced, limit, spare)
            except InputError as error:
                too_small.append((sum(smallest_memory(placement, priced, spare)), error))
                del fitting[placement]
        if not fitting:
            raise min(too_small, key=lambda refused: refused[0])[1]
    units = Units.of(fitting, microbatches, limit)
    return units, [
        Space(placement, passing, priced, limit, units)
        for placement, priced in fitting.items()
        for passing in _shares(placement, microbatches, priced)
    ]


def _shares(placement: Placement, microbatches: int, costs: Costs) -> list[tuple[int, ...]]:
    """How the pipes may share the micro-batches: halves, and what gives the busiest rank less to do. Where a piece of
    the model takes the same time wherever it is, nothing does."""
    if len(placement.pipes) == 1:
        return [(microbatches,)]
    kinds = costs.forward, costs.input_gradient, costs.weight_gradient
    down, up = ([sum(kind[stage] for kind in kinds) for stage in pipe] for pipe in placement.pipes)

    def busiest(first: int) -> float:
        return max(first * a + (microbatches - first) * b for a, b in zip(down, reversed(up), strict=True))

    half = (microbatches + 1) // 2
    best = min(range(1, microbatches), key=lambda first: (busiest(first), abs(2 * first - microbatches)))
    less = busiest(best) * SLACK < busiest(half)
    return [(first, microbatches - first) for first in ((half, best) if less else (half,))]
