"""The critical path: a chain without a gap from the start of the step to its end."""

from __future__ import annotations

import random

import pytest

from pipex.plan.actions import Kind
from pipex.plan.costs import Costs
from pipex.plan.critical_path import critical_path
from pipex.plan.families import FAMILIES, build
from pipex.plan.placement import Edge
from pipex.plan.plan import Plan
from pipex.plan.simulator import simulate


def path_of(plan: Plan, costs: Costs) -> list[str]:
    simulation = simulate(plan, costs)
    return [str(plan.orders[rank][position]) for rank, position in critical_path(plan, costs, simulation)]


def test_paths_of_1f1b_by_hand() -> None:
    """With equal stages the path goes with the last micro-batch; behind a slow first stage it stays on rank 0."""
    plan = build("1f1b", 2, 2)
    costs = Costs([2, 1], [1, 3], [0, 0], dict.fromkeys(plan.edges, 0.5), [1, 1], [1, 1])
    # rank 0: 0F0 0-2, 0F1 2-4, 0B0 7-8, 0B1 11-12; rank 1: 1F0 2.5-3.5, 1B0 3.5-6.5, 1F1 6.5-7.5, 1B1 7.5-10.5
    assert path_of(plan, costs) == ["0F0", "1F0", "1B0", "1F1", "1B1", "0B1"]
    costs = Costs([9, 1], [1, 3], [0, 0], dict.fromkeys(plan.edges, 0.5), [1, 1], [1, 1])
    assert path_of(plan, costs) == ["0F0", "0F1", "1F1", "1B1", "0B1"]


def test_a_path_ends_with_the_last_action_of_any_rank() -> None:
    plan = build("zb-h1", 2, 1)
    costs = Costs([1, 1], [1, 1], [1, 9], dict.fromkeys(plan.edges, 0.0), [1, 1], [1, 1])
    assert path_of(plan, costs) == ["0F0", "1F0", "1I0", "1W0"]


def chain_of_needs(plan: Plan, costs: Costs, path: tuple[tuple[int, int], ...]) -> None:
    """Every step of the path is to the next action of the rank, or along a message to what needs it."""
    simulation = simulate(plan, costs)
    timed = [simulation.timeline[rank][position] for rank, position in path]
    assert timed[0].start == 0
    assert timed[-1].end == simulation.makespan
    for (rank, position), before, (next_rank, next_position), after in zip(
        path, timed, path[1:], timed[1:], strict=False
    ):
        if next_rank == rank:
            assert next_position == position + 1
            assert after.start == before.end
            continue
        messages = [
            Edge(a.stage, b.stage, "activation" if b.kind is Kind.F else "gradient")
            for a in before.action.each
            for b in after.action.each
            if a.microbatch == b.microbatch
            and b.stage - a.stage == (1 if b.kind is Kind.F else -1)
            and (a.kind is Kind.F) == (b.kind is Kind.F)
            and Kind.W not in (a.kind, b.kind)
        ]
        assert any(after.start == before.end + costs.hop[edge] for edge in messages)


@pytest.mark.parametrize("family", [*FAMILIES, "random"])
def test_a_path_has_no_gap(family: str, random_plans: list[Plan]) -> None:
    rng = random.Random(family)
    for plan in random_plans[:60] if family == "random" else [build(family, 4, 8), build(family, 2, 4)]:
        for times in ((0, 1, 3), (1,), tuple(rng.random() for _ in range(20))):
            f, i, w = ([float(rng.choice(times)) for _ in range(plan.placement.stages)] for _ in range(3))
            hop = {edge: float(rng.choice(times)) for edge in plan.edges}
            costs = Costs(f, i, w, hop, f, f, overlap=0.75)
            chain_of_needs(plan, costs, critical_path(plan, costs, simulate(plan, costs)))


def test_a_simulation_of_something_else_is_our_own_mistake() -> None:
    plan = build("1f1b", 2, 2)
    costs, others = Costs.uniform(plan), Costs.uniform(plan, hop=1)
    with pytest.raises(AssertionError, match=r"0B1 on rank 0 starts at 9\.0 for no reason"):
        critical_path(plan, costs, simulate(plan, others))
