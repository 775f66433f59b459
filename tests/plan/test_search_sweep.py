"""The search against the orders of open schedulers, in 200 random cells, and with more time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from cases import sampled
from torch.distributed.pipelining import schedules

from pipex.errors import InputError
from pipex.plan.actions import Action, Kind
from pipex.plan.communication import unfused
from pipex.plan.costs import RankCosts
from pipex.plan.families import build
from pipex.plan.placement import Placement, PlacementName
from pipex.plan.plan import Plan
from pipex.plan.search import search
from pipex.plan.simulator import simulate
from pipex.plan.validator import validate

pytestmark = pytest.mark.long

TORCH: list[tuple[str, PlacementName]] = [
    ("Interleaved1F1B", "loop"), ("LoopedBFS", "loop"), ("InterleavedZeroBubble", "loop"),
    ("ZBVZeroBubble", "v"), ("DualPipeV", "v"),
]  # fmt: skip


def torch_plan(name: str, placement: Placement, microbatches: int) -> Plan:
    """The order that torch's schedule of this name makes. Raises ValueError where torch refuses the sizes."""
    stages: list[Any] = [
        SimpleNamespace(
            stage_index=chunk, num_stages=placement.stages, group_size=placement.ranks, group_rank=0,
            is_first=chunk == 0, is_last=False, submod=None, group=None, device="cpu", has_backward=True,
        )
        for chunk in range(placement.chunks)
    ]  # fmt: skip
    schedule = getattr(schedules, f"Schedule{name}")(stages, microbatches)

    def actions(order: list[Any]) -> Iterator[Action]:
        for action in order:
            for part in (action.sub_actions or (action,)) if action else ():
                yield Action(part.stage_index, Kind(part.computation_type.value), part.microbatch_index)

    orders = tuple(tuple(actions(schedule.pipeline_order[rank])) for rank in range(placement.ranks))
    return Plan("torch", placement, microbatches, orders, (microbatches * placement.chunks,) * placement.ranks)


def open_plans(ranks: int, microbatches: int, costs: RankCosts, memory: list[float]) -> Iterator[Plan]:
    for family, options in [("1f1b", {}), ("zb-h1", {}), ("zb-auto", {"costs": costs, "memory": memory})]:
        try:
            yield build(family, ranks, microbatches, **options)
        except InputError:
            continue
    for name, shape in TORCH:
        for chunks in (2, 3, 4) if shape == "loop" else (2,):
            try:
                yield torch_plan(name, Placement(shape, ranks, chunks), microbatches)
            except (ValueError, RuntimeError):
                continue


@pytest.mark.parametrize("cell", sampled(range(200), 20, name="search"))
def test_the_search_is_never_worse_than_an_open_scheduler_s_order(cell: int) -> None:
    rng = random.Random(cell)
    ranks = rng.choice([2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32])
    microbatches = rng.randint(1, 8 * ranks)
    f, i, w = rng.choice([(1, 1, 1), (100, 100, 65), (1, 1.3, 0.5), (1, 0.8, 0.9)])
    spread = rng.choice([0.0, 0.1, 0.4])
    jitter = [1 + spread * rng.uniform(-1, 1) for _ in range(ranks)]
    if rng.random() < 0.3:
        jitter[-1] *= 1.5
    model = RankCosts.of(
        ranks, [f * x for x in jitter], [i * x for x in jitter], [w * x for x in jitter],
        hop=rng.choice([0, 0.02, 0.1]) * f, deferred=rng.choice([None, 0.5]),
    )  # fmt: skip
    memory = [max(1.0, rng.choice([0.5, 0.75, 1.0, 1.0, 1.2, 2.0]) * ranks) for _ in range(ranks)]
    if rng.random() < 0.6:
        memory = [max(1.0, rng.choice([0.5, 0.7, 0.9, 1.0, 1.0, 1.1, 1.5, 2.0]) * ranks)] * ranks
    objective = rng.choice(["makespan", "makespan", "span"])
    result = search(
        model, memory, ranks=ranks, microbatches=microbatches, objective=objective, evaluations=150
    )  # fmt: skip
    validate(result.plan)
    simulation = result.simulation
    assert all(peak <= most * (1 + 1e-9) for peak, most in zip(simulation.peak_memory, memory, strict=True))
    found = simulation.makespan if objective == "makespan" else simulation.span
    assert result.bound.value <= found * (1 + 1e-9)
    compared = 0
    for plan in open_plans(ranks, microbatches, model, memory):
        other = simulate(unfused(plan), model.on(plan.placement))
        if all(peak <= most for peak, most in zip(other.peak_memory, memory, strict=True)):
            compared += 1
            value = other.makespan if objective == "makespan" else other.span
            assert found <= value * (1 + 1e-6), (plan.family, plan.placement, value / found)
    print(f"{ranks} ranks, {microbatches} micro-batches: compared with {compared}, {result.distance:.2%} off the bound")


def makespan_bubble(memory: float, evaluations: int) -> float:
    costs = RankCosts.of(8, 100, 100, 65, 2)
    result = search(costs, memory, ranks=8, microbatches=32, evaluations=evaluations)
    return 1 - 32 * 265 / result.simulation.makespan


BEST_KNOWN = [(8, 40_000, 0.030), (6, 40_000, 0.0625), (4, 60_000, 0.171)]  # .170 is the best that we have seen


@pytest.mark.parametrize(("memory", "evaluations", "most"), sampled(BEST_KNOWN, 1, name="best known"))
def test_more_evaluations_come_closer_to_the_best_known(memory: float, evaluations: int, most: float) -> None:
    """About 20 seconds each on one core."""
    assert makespan_bubble(memory, evaluations) <= most
