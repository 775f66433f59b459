"""Whole numbers for the list scheduler, so that its native twin and the Python one find the same plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

from pipex.plan.actions import Kind
from pipex.plan.bounds import SLACK
from pipex.plan.costs import Costs
from pipex.plan.list_scheduler import Problem
from pipex.plan.placement import Placement

_WHOLE = 840_000
"""A unit is one over a power of two times this: costs of up to 3 decimals, shared by up to 8 chunks, stay exact."""


@dataclass(frozen=True)
class Units:
    """How many whole units make one unit of the costs; the same for all placements, so that times can be compared.

    Attributes:
        time: for times; a rank's work for one micro-batch, or a hop, is less than 2^36 of them.
        memory: for memory; a limit is less than 2^42 of them, fine enough for ``SLACK``.
    """

    time: float
    memory: float

    @staticmethod
    def of(costs: Mapping[Placement, Costs], microbatches: int, limit: Sequence[float] | None) -> Units:
        """Units for all of these placements."""
        times, all_time, all_memory = [0.0], 0.0, 0.0
        for placement, cost in costs.items():
            kinds = [cost.forward, cost.input_gradient, cost.weight_gradient]
            kinds += [cost.recompute] if cost.recompute is not None else []
            for rank in range(placement.ranks):
                times.append(sum(kind[stage] for kind in kinds for stage in placement.stages_of(rank)))
            times += cost.hop.values()
            all_time = max(all_time, microbatches * sum(map(sum, kinds)), microbatches * sum(cost.hop.values()))
            all_memory = max(all_memory, microbatches * sum(_limits(placement, microbatches, cost, limit)))
        most_memory = max((x for x in limit or () if x < math.inf), default=0.0)
        return Units(_per_unit(max(times), all_time, 36), _per_unit(most_memory, all_memory, 42))

    def times(self, values: Iterable[float]) -> tuple[int, ...]:
        """Times of the costs as whole numbers."""
        return tuple(round(value * self.time) for value in values)

    def memories(self, values: Iterable[float]) -> tuple[int, ...]:
        """Amounts of memory as whole numbers."""
        return tuple(round(value * self.memory) for value in values)

    def limits(
        self, placement: Placement, microbatches: int, costs: Costs, limit: Sequence[float] | None
    ) -> tuple[int, ...]:
        """Per rank what the limit leaves for activations, or what all micro-batches need at once if that is less."""
        return self.memories(most * SLACK for most in _limits(placement, microbatches, costs, limit))

    def problem(
        self,
        placement: Placement,
        microbatches: int,
        costs: Costs,
        limit: Sequence[float] | None,
        passing: tuple[int, ...] = (),
        recomputed: Sequence[int] = (),
        offloaded: Sequence[int] = (),
    ) -> Problem:
        """What is to be scheduled. Copies take no time here, but a rank has less memory: by the largest that it
        offloads, while its F runs, and where that leaves more than half, as much again for one on its way."""
        stages = range(placement.stages - 1)
        spared = costs.spared(recomputed, offloaded)
        copies = [
            max((costs.activation[s] for s in offloaded if placement.rank_of(s) == rank), default=0.0)
            for rank in range(placement.ranks)
        ]
        limits = zip(self.limits(placement, microbatches, costs, limit), self.memories(copies), strict=True)
        ahead = [placement.ends.get((stage, Kind.SEND_F)) for stage in stages]
        back = [placement.ends.get((stage, Kind.RECV_B)) for stage in stages]
        return Problem(
            placement,
            microbatches,
            forward=self.times(costs.forward),
            input_gradient=self.times(spared.input_gradient),
            weight_gradient=self.times(costs.weight_gradient),
            activation_hop=self.times(costs.hop[edge] if edge else 0.0 for edge in ahead),
            gradient_hop=self.times(costs.hop[edge] if edge else 0.0 for edge in back),
            activation=self.memories(costs.activation),
            deferred=self.memories(costs.deferred),
            limit=tuple(max(0, most - min(2 * copy, max(copy, most // 2))) for most, copy in limits),
            kept=self.memories(spared.activation),
            passing=passing,
        )


def _limits(placement: Placement, microbatches: int, costs: Costs, limit: Sequence[float] | None) -> list[float]:
    """Per rank what the limit leaves for activations, or what all micro-batches need at once if that is less."""
    limits = []
    for rank, weights in enumerate(costs.weights_held(placement)):
        needed = sum(max(costs.activation[s], costs.deferred[s]) for s in placement.stages_of(rank))
        limits.append(min(microbatches * needed, math.inf if limit is None else limit[rank] - weights))
    return limits


def _per_unit(largest: float, total: float, bits: int) -> float:
    """840 000 times a power of two: the largest value stays below 2^bits, and the total below 2^54."""
    room = min((2.0**most / value for most, value in ((bits, largest), (54, total)) if value), default=float(_WHOLE))
    return _WHOLE * 2.0 ** math.floor(math.log2(room / _WHOLE))


def with_medians(problem: Problem) -> Problem:
    """The same with the median time of each kind at every stage: jitter in measured times is no reason for a jittery
    order, while one heavy stage is; who plans for both, and replays on the true times, takes the better plan."""
    stages = problem.placement.stages
    return replace(
        problem,
        forward=(median_low(problem.forward),) * stages,
        input_gradient=(median_low(problem.input_gradient),) * stages,
        weight_gradient=(median_low(problem.weight_gradient),) * stages,
    )


def with_whole_backward(problem: Problem) -> Problem:
    """The same for orders in which every W stands behind its I and both run as one B: what B makes leaves at its end,
    and what B needs is freed there."""
    return replace(
        problem,
        input_gradient=tuple(map(sum, zip(problem.input_gradient, problem.weight_gradient, strict=True))),
        weight_gradient=(0,) * problem.placement.stages,
        deferred=(0,) * problem.placement.stages,
    )
