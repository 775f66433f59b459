"""Models fitted to plans, against every cut simulated one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from pipex.errors import InputError
from pipex.plan import fit as module
from pipex.plan.chain import uniform
from pipex.plan.cut import _Search, cuts, held_blocks
from pipex.plan.families import build
from pipex.plan.fit import Fit, fit
from pipex.plan.layer_costs import Layer, LayerCosts
from pipex.plan.memory import peak_memory
from pipex.plan.plan import Plan
from pipex.plan.simulator import simulate


def model(layers: int, head: float = 1.0, seed: int = 0, noise: float = 0.2) -> LayerCosts:
    rng = random.Random(seed)

    def layer(name: str, scale: float) -> Layer:
        f = scale * (1 + noise * rng.uniform(-1, 1))
        return Layer(name, f, f, 0.6 * f, *(rng.randint(1, 100) for _ in range(4)))

    blocks = [layer("block", 1.0) for _ in range(layers - 1)]
    return LayerCosts((*blocks, layer("head", head)), latency=0.05)


def bytes_needed(costs: LayerCosts, plan: Plan, counts: Sequence[int], state: float) -> list[float]:
    """From the definition: weights with their state and further versions, and the peak of the activations."""
    stages = costs.of(plan.placement, counts)
    activations = peak_memory(plan, stages.activation, stages.deferred)
    return [
        sum(layer.parameters for a, b in blocks for layer in costs.layers[a:b]) * (state + versions - 1) + activation
        for blocks, versions, activation in zip(
            held_blocks(plan.placement, counts), plan.weight_versions, activations, strict=True
        )
    ]


def check(found: Fit, costs: LayerCosts, plan: Plan, state: float = 4.0) -> None:
    assert found.costs == costs.of(plan.placement, found.counts)
    assert found.simulation == simulate(plan, found.costs)
    assert found.memory == pytest.approx(bytes_needed(costs, plan, found.counts, state), rel=1e-12)
    assert found.bound <= found.bottleneck * (1 + 1e-9)


@pytest.mark.parametrize("update", ["step", "microbatch", "delayed"])
def test_memory_is_that_of_the_definition(
    update: str, random_plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Search, "BUDGET", 5_000)
    for seed, plan in enumerate(random_plans[:25]):
        changed = replace(plan, update=update)  # type: ignore[arg-type]
        costs = model(plan.placement.stages + 3, seed=seed)
        check(fit(costs, changed, state=3.0), costs, changed, state=3.0)


def test_memory_without_a_backward_is_that_of_one_forward() -> None:
    plan = build("gpipe", 2, 3)
    forward = tuple(order[:3] for order in plan.orders)
    plan = replace(plan, orders=forward, update="never")
    costs = model(6)
    check(fit(costs, plan), costs, plan)


@pytest.mark.parametrize(("family", "ranks", "m"), [
    ("1f1b", 3, 3), ("1f1b", 3, 8), ("zb-h1", 3, 5), ("gpipe", 4, 2), ("dualpipe", 2, 4), ("chimera", 4, 4),
])  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_the_simulated_step_is_as_short_as_that_of_nearly_any_cut(family: str, ranks: int, m: int, seed: int) -> None:
    plan, costs = build(family, ranks, m), model(10, head=2.0, seed=seed)
    found = fit(costs, plan)
    check(found, costs, plan)
    every = [tuple(b - a for a, b in pairwise((0, *ends, 10))) for ends in combinations(range(1, 10), ranks - 1)]
    makespans = {counts: simulate(plan, costs.of(plan.placement, counts)).makespan for counts in every}
    for source, target in [*pairwise(range(ranks)), *((b, a) for a, b in pairwise(range(ranks)))]:
        moved = tuple(n - (i == source) + (i == target) for i, n in enumerate(found.counts))
        if min(moved) > 0:
            assert makespans[moved] >= found.simulation.makespan  # no neighbour is better
    assert found.simulation.makespan <= makespans[tuple(uniform(10, ranks))]
    assert found.simulation.makespan <= min(makespans.values()) * 1.02


def test_a_plan_with_two_copies_is_fitted_over_the_pieces_of_one() -> None:
    plan, costs = build("chimera", 4, 8), model(11, head=2.0)
    found = fit(costs, plan)
    assert len(found.counts) == 4
    assert sum(found.counts) == 11
    check(found, costs, plan)
    held = held_blocks(plan.placement, found.counts)
    assert [sorted(blocks) for blocks in held] == [sorted(blocks) for blocks in held[::-1]]
    least = max(fit(costs, plan).memory)
    assert max(fit(costs, plan, memory=0.97 * least).memory) <= 0.97 * least


def test_with_few_micro_batches_the_smallest_bottleneck_is_not_the_shortest_step() -> None:
    """The reason for judging by simulation."""
    plan, costs = build("1f1b", 16, 16), model(127, head=5.0, noise=0.0)
    found = fit(costs, plan)
    start = simulate(plan, costs.on(plan.placement))
    assert found.simulation.makespan < 0.985 * start.makespan
    assert found.bottleneck > found.bound


def test_several_chunks_per_rank_are_not_cut_by_their_bottleneck_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Search, "BUDGET", 60_000)
    plan = build("interleaved", 4, 8, chunks=2)
    costs = model(40, head=3.0)
    found = fit(costs, plan)
    check(found, costs, plan)
    assert found.simulation.makespan <= simulate(plan, costs.of(plan.placement, uniform(40, 8))).makespan


def test_the_best_of_all_starts_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Search, "BUDGET", 60_000)
    monkeypatch.setattr(module, "BUDGET", 1)  # nothing but the starts
    plan, costs = build("interleaved", 4, 16, chunks=2), model(60, head=4.0)
    starts = [simulate(plan, costs.of(plan.placement, cut.counts)) for cut in cuts(costs.times, plan.placement)]
    makespans = [simulation.makespan for simulation in starts]
    assert fit(costs, plan).simulation.makespan == min(makespans) < max(makespans)


def test_memory_limits_are_kept() -> None:
    plan, costs = build("1f1b", 4, 8), model(20, head=2.0)
    free = fit(costs, plan)
    limit = 0.95 * max(free.memory)
    found = fit(costs, plan, memory=limit)
    check(found, costs, plan)
    assert max(found.memory) <= limit
    assert found.simulation.makespan >= free.simulation.makespan
    tight = 0.7 * free.memory[3]
    assert fit(costs, plan, memory=(1e9, 1e9, 1e9, tight)).memory[3] <= tight


def test_the_smallest_limit_that_an_error_names_is_the_smallest() -> None:
    plan, costs = build("zb-h1", 3, 6), model(9)
    every = [tuple(b - a for a, b in pairwise((0, *ends, 9))) for ends in combinations(range(1, 9), 2)]
    smallest = min(max(bytes_needed(costs, plan, counts, 4.0)) for counts in every)
    assert max(fit(costs, plan, memory=smallest * (1 + 1e-9)).memory) <= smallest * (1 + 1e-9)
    for share in (1e-3, 0.5, 0.999):
        with pytest.raises(InputError) as caught:
            fit(costs, plan, memory=smallest * share)
        assert f"needed at least {round(smallest)} bytes per rank" in str(caught.value)
    with pytest.raises(InputError, match=r"got 1, 2, 2 bytes per rank; needed at least \d+, \d+, \d+ bytes per rank"):
        fit(costs, plan, memory=(1, 2, 2))
    several = build("interleaved", 1, 2, chunks=2)
    with pytest.raises(InputError, match="as far as was searched; got 5 bytes"):
        fit(costs, several, memory=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0.0}, "bad memory limit of rank 0; got 0.0"),
        ({"memory": float("nan")}, "bad memory limit of rank 0; got nan"),
        ({"memory": (1e9, 1e9, -1.0)}, "bad memory limit of rank 2; got -1.0"),
        ({"memory": (1e9, 1e9)}, "wrong number of memory limits; got 2; needed 1 or 3, one per rank"),
        ({"state": 0.5}, "bad state; got 0.5; needed at least 1 byte"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        fit(model(9), build("1f1b", 3, 3), **options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(InputError, match="a model of 3 layers cannot be cut into 4 stages"):
        fit(model(3), build("1f1b", 4, 4))


def test_the_budget_bounds_the_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "simulate", lambda *given: calls.append(given) or simulate(*given))
    plan, costs = build("1f1b", 8, 16), model(60, head=4.0)
    fit(costs, plan)
    assert 0 < len(calls) * sum(map(len, plan.orders)) <= module.BUDGET
    calls.clear()
    monkeypatch.setattr(module, "BUDGET", 1)
    assert fit(costs, plan).counts == tuple(calls and fit(costs, plan).counts)
    assert len(calls) == 2  # the start alone, each time
