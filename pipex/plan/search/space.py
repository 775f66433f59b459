"""The placements that a search looks at."""

from __future__ import annotations

from collections.abc import Sequence

from pipex.errors import InputError
from pipex.plan.bounds import Bound, check_limit, makespan_bound, smallest_memory, span_bound
from pipex.plan.costs import CostModel, Costs
from pipex.plan.list_scheduler.improvement import Objective
from pipex.plan.placement import Placement
from pipex.plan.plan import Update
from pipex.plan.search.rules import Pool
from pipex.plan.search.units import Units, with_medians


class Space:
    """All plans on one placement.

    Attributes:
        costs: the true costs.
        problem: the same for the list scheduler; None for two pipes, where it cannot plan.
        median_problem: the problem with median times; None where these are the true ones.
        whole_limit: per rank the limit in whole numbers.
        family: the name under which plans by due dates go here; None where the search makes none.
        pool: the rules tried here.
    """

    def __init__(
        self, placement: Placement, costs: Costs, microbatches: int, limit: Sequence[float] | None, units: Units
    ) -> None:
        self.placement, self.costs, self.microbatches, self.limit = placement, costs, microbatches, limit
        self.problem = units.problem(placement, microbatches, costs, limit) if len(placement.pipes) == 1 else None
        self.whole_limit = units.limits(placement, microbatches, costs, limit)
        self.median_problem = None
        if self.problem is not None and (medians := with_medians(self.problem)) != self.problem:
            self.median_problem = medians
        self.family = {"loop": "interleaved-zb" if placement.chunks > 1 else "zb-auto", "v": "zbv"}.get(placement.name)
        self.pool = Pool()
        self._bounds: dict[tuple[Objective, Update], Bound] = {}

    def bound(self, objective: Objective, update: Update = "step") -> Bound:
        """What no plan here can go below."""
        if (objective, update) not in self._bounds:
            of = makespan_bound if objective == "makespan" else span_bound
            self._bounds[objective, update] = of(self.placement, self.microbatches, self.costs, self.limit, update)
        return self._bounds[objective, update]


def spaces_of(
    costs: CostModel, ranks: int, microbatches: int, chunks: int, limit: Sequence[float] | None
) -> tuple[Units, dict[Placement, Space]]:
    """All placements of at most ``chunks`` chunks that the costs fit and that have plans within the limit.

    Raises:
        InputError: there is none; says why, for a limit how much one needs.
    """
    placements = [Placement("loop", ranks, v) for v in range(1, chunks + 1)]
    if chunks > 1:
        placements += [Placement("v", ranks, 2), Placement("bidirectional", ranks, 2)]
        placements += [Placement("wave", ranks, v) for v in range(2, chunks + 1, 2)]
    fitting: dict[Placement, Costs] = {}
    misfit: InputError | None = None
    for placement in placements:
        try:
            fitting[placement] = costs.on(placement)
        except InputError as error:
            misfit = misfit or error
    if not fitting and misfit is not None:
        raise misfit
    if limit is not None:
        refused: list[tuple[float, InputError]] = []
        for placement, priced in list(fitting.items()):
            try:
                check_limit(placement, priced, limit)
            except InputError as error:
                refused.append((sum(smallest_memory(placement, priced)), error))
                del fitting[placement]
        if not fitting:
            raise min(refused, key=lambda pair: pair[0])[1]
    units = Units.of(fitting, microbatches, limit)
    return units, {p: Space(p, priced, microbatches, limit, units) for p, priced in fitting.items()}
