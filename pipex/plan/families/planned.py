"""Orders planned by due dates with real times, for the families whose published order knows one shape of them only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import add

from pipex.errors import PlanError
from pipex.plan.bounds import check_limit
from pipex.plan.costs import CostModel
from pipex.plan.list_scheduler import PORTFOLIO, Packed, list_schedule, pack, replay, unpack
from pipex.plan.memory import peak_memory
from pipex.plan.plan import Plan


def planned(published: Plan, costs: CostModel, memory: float | Sequence[float] | None) -> Plan:
    """The plan with the shortest makespan (then span) among ``published`` and what the list scheduler's rules make for
    the same placement, each replayed with its true times. For more than these few tries there is the search.

    Args:
        published: with I and W apart.
        memory: one limit for all ranks or one per rank, in the unit of the costs' activation; None: on every rank as
            much as ``published`` holds.

    Raises:
        InputError: the costs do not fit the placement, or the limits do not, or are below what any plan holds.
        PlanError: nothing tried keeps the limits (names those that ``published`` keeps).
    """
    from pipex.plan.search.units import Units  # the search itself needs the families

    placement, microbatches = published.placement, published.microbatches
    times = costs.on(placement)
    own = tuple(map(add, times.weights_held(placement), peak_memory(published, times.activation, times.deferred)))
    limit = own if memory is None else memory if isinstance(memory, Sequence) else [memory] * placement.ranks
    check_limit(placement, times, limit)
    problem = Units.of({placement: times}, microbatches, limit).problem(placement, microbatches, times, limit)
    best: tuple[int, int, Packed] | None = None
    for packed in (
        pack(problem, published.orders),
        *(list_schedule(problem, rule) for rule in PORTFOLIO[placement.name]),
    ):
        if packed is None or (course := replay(problem, packed)) is None:
            continue
        within = all(peak <= top for peak, top in zip(course.peaks, problem.limit, strict=True))
        if within and (best is None or (course.makespan, course.span) < best[:2]):
            best = course.makespan, course.span, packed
    if best is None:
        what = f"no plan found for {published.family} within the memory limits"
        kept = ", ".join(f"{peak:g}" for peak in own)
        raise PlanError(what, got=", ".join(f"{top:g}" for top in limit), fix=f"the published order keeps {kept}")
    plan = replace(published, orders=unpack(problem, best[2]))
    ones = [1] * placement.stages
    return replace(plan, peak_activations=tuple(map(int, peak_memory(plan, ones, ones))))
