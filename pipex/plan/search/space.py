"""The placements that a search looks at."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from math import inf

from pipex.errors import InputError
from pipex.plan.bounds import Bound, Spare, check_limit, makespan_bound, smallest_memory, span_bound
from pipex.plan.costs import CostModel, Costs
from pipex.plan.list_scheduler import Problem
from pipex.plan.list_scheduler.improvement import Objective
from pipex.plan.placement import Placement
from pipex.plan.search.rules import Pool
from pipex.plan.search.units import Units, with_medians
from pipex.plan.versions import Update


class Space:
    """All plans on one placement.

    Attributes:
        costs: the true costs.
        limit: per rank the memory that plans may have, in the unit of the costs; None: any.
        whole_limit: the same in whole numbers.
        family: the name under which plans by due dates go here; empty where the search makes none.
        median_problem: the problem with median times; None where these are the true ones.
        pool: the rules tried here.
        recomputed, offloaded: the stages of its plans that are.
    """

    def __init__(
        self,
        placement: Placement,
        costs: Costs,
        microbatches: int,
        limit: Sequence[float] | None,
        units: Units,
        recomputed: tuple[int, ...] = (),
        offloaded: tuple[int, ...] = (),
    ) -> None:
        self.placement, self.costs, self.microbatches, self.limit = placement, costs, microbatches, limit
        self.units, self.recomputed, self.offloaded = units, recomputed, offloaded
        self.whole_limit = units.limits(placement, microbatches, costs, limit)
        self.one_pipe = len(placement.pipes) == 1
        self._problem = None
        if self.one_pipe:
            self._problem = units.problem(placement, microbatches, costs, limit, recomputed, offloaded)
        loop = "interleaved-zb" if placement.chunks > 1 else "zb-auto"
        self.family = {"loop": loop, "v": "zbv"}.get(placement.name, "")
        self.median_problem = None
        plain = not (recomputed or offloaded)  # of mixed times there is no median
        if self._problem is not None and plain and (medians := with_medians(self._problem)) != self._problem:
            self.median_problem = medians
        self.pool = Pool()
        self.bound = cache(self._bound)

    @property
    def problem(self) -> Problem:
        """The costs for the list scheduler, which knows one pipe."""
        assert self._problem is not None
        return self._problem

    def sparing(self, recomputed: tuple[int, ...], offloaded: tuple[int, ...]) -> Space:
        """The same placement, with these stages recomputed and offloaded."""
        return Space(
            self.placement, self.costs, self.microbatches, self.limit, self.units, recomputed, offloaded
        )  # fmt: skip

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
) -> tuple[Units, dict[Placement, Space]]:
    """All placements of at most ``chunks`` chunks that the costs fit and that have plans within the limit, some of
    whose stages may be spared. Where there are none that spare nothing, the space of these is empty.

    Raises:
        InputError: there is none; says why, for a limit how much is needed.
    """
    placements = [Placement("loop", ranks, v) for v in range(1, chunks + 1)]
    if chunks > 1:
        placements += [Placement("v", ranks, 2), Placement("bidirectional", ranks, 2)]
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
    return units, {p: Space(p, priced, microbatches, limit, units) for p, priced in fitting.items()}
