"""What the search answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pipex.plan.bounds import Bound
from pipex.plan.costs import Costs
from pipex.plan.list_scheduler import Packed, Problem, unpack
from pipex.plan.list_scheduler.improvement import Objective
from pipex.plan.memory import with_promise
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, simulate
from pipex.plan.versions import Update

Origin = Literal["published", "planned", "planned on medians", "improved"]


@dataclass(frozen=True)
class Candidate:
    """A plan that the search judged.

    Attributes:
        family: whose orders these are, or for planned ones, whose placement they have.
        origin: how the orders came about.
        placement, microbatches, update: those of the plan.
        makespan, span: of its replay on the true costs, in their unit of time.
        peak_memory: per rank, in their unit of memory.
        orders: what ``plan`` is made of.
        recomputed, offloaded: those of the plan.
    """

    family: str
    origin: Origin
    placement: Placement
    microbatches: int
    update: Update
    makespan: float
    span: float
    peak_memory: tuple[float, ...]
    orders: Plan | tuple[Problem, Packed] = field(repr=False, compare=False)
    recomputed: tuple[int, ...] = ()
    offloaded: tuple[int, ...] = ()

    @cached_property
    def plan(self) -> Plan:
        """Its orders; made on first use, since few of many candidates are looked at."""
        if isinstance(self.orders, Plan):
            return self.orders
        problem, packed = self.orders
        orders, ranks = unpack(problem, packed), self.placement.ranks
        draft = Plan(self.family, self.placement, self.microbatches, orders, (0,) * ranks, recomputed=self.recomputed)
        return with_promise(draft)


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    Attributes:
        best: the candidate with the smallest makespan, or span.
        runners_up: the best of every other family, number of chunks and way to spare memory that was not ruled out by
            its bound, best first.
        costs: the true costs of the best one's placement.
        bound: what no plan on any of the placements searched can go below, whatever makes it.
        objective: which time was to be made small.
        limit: per rank the memory that plans may have; None: any.
        evaluations: how many orders were judged, small changes counted as the fraction of one that they take.
        capped: whether the seconds ended the search before the evaluations did; another run may then give another plan.
    """

    best: Candidate
    runners_up: tuple[Candidate, ...]
    costs: Costs
    bound: Bound
    objective: Objective
    limit: tuple[float, ...] | None
    evaluations: int
    capped: bool

    @property
    def plan(self) -> Plan:
        """The best plan."""
        return self.best.plan

    @cached_property
    def simulation(self) -> Simulation:
        """Its course under the true costs."""
        return simulate(self.plan, self.costs)

    @property
    def distance(self) -> float:
        """By what share of the bound the best plan is above it."""
        value = self.best.makespan if self.objective == "makespan" else self.best.span
        return value / self.bound.value - 1 if self.bound.value else 0.0
