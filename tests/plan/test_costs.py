"""Costs of whole ranks land on the stages of every placement, and bad costs are named."""

from __future__ import annotations

import math

import pytest

from pipex.errors import InputError
from pipex.plan.costs import Costs, RankCosts
from pipex.plan.placement import Placement


@pytest.mark.parametrize(
    ("placement", "per_stage"),
    [
        (Placement("loop", 3), [1, 2, 4]),
        (Placement("loop", 3, 2), [0.5, 1, 2, 0.5, 1, 2]),
        (Placement("v", 3, 2), [0.5, 1, 2, 2, 1, 0.5]),
        (Placement("wave", 3, 4), [0.25, 0.5, 1, 1, 0.5, 0.25] * 2),
        (Placement("bidirectional", 3, 2), [1, 2, 4, 1, 2, 4]),  # the same layers once more, up the ranks
    ],
    ids=str,
)
def test_a_ranks_costs_are_shared_by_its_stages(placement: Placement, per_stage: list[float]) -> None:
    costs = RankCosts.of(3, (1, 2, 4), 1, 1, hop=0.5, activation=(1, 2, 4), weights=(1, 2, 4), exchange=7)
    costs = costs.on(placement)
    assert costs.forward == costs.weights == per_stage
    assert costs.exchange == 7
    assert costs.activation == costs.deferred == per_stage
    assert costs.hop == dict.fromkeys(placement.edges, 0.5)


def test_a_rank_holds_the_weights_of_both_copies() -> None:
    model = RankCosts.of(4, weights=(1, 2, 4, 8))
    for placement, held in (
        (Placement("loop", 4), (1, 2, 4, 8)),
        (Placement("wave", 4, 4), (1, 2, 4, 8)),
        (Placement("bidirectional", 4, 2), (1 + 8, 2 + 4, 4 + 2, 8 + 1)),
    ):
        assert model.on(placement).weights_held(placement) == held
        assert RankCosts.of(4).on(placement).weights_held(placement) == (0, 0, 0, 0)


def test_costs_per_stage_fit_their_number_of_stages_only() -> None:
    costs = RankCosts.of(2, (1, 2, 3, 4), 1)
    assert costs.on(Placement("loop", 2, 2)).forward == [1, 2, 3, 4]
    assert costs.on(Placement("loop", 2, 2)).input_gradient == [0.5] * 4
    with pytest.raises(InputError, match=r"got 4; needed 2, one per rank, or 6, one per stage"):
        costs.on(Placement("loop", 2, 3))


def test_costs_of_other_ranks_are_refused() -> None:
    with pytest.raises(InputError, match="another number of ranks; got 2; needed 3"):
        RankCosts.of(2).on(Placement("loop", 3))


@pytest.mark.parametrize("values", [(), (1, 2, 3)])
def test_a_wrong_number_of_costs_is_named(values: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=rf"wrong number of costs weight_gradient; got {len(values)}; needed 1, 2 "):
        RankCosts.of(2, weight_gradient=values)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    ["forward", "input_gradient", "weight_gradient", "hop", "activation", "overlap", "weights", "exchange"],
)
def test_a_bad_cost_is_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"bad cost: {name}"):
        RankCosts.of(2, **{name: value})


def test_costs_per_stage_are_a_model_of_their_own_placement() -> None:
    placement = Placement("v", 2, 2)
    costs = RankCosts.of(2).on(placement)
    assert costs.on(placement) is costs
    with pytest.raises(InputError, match="wrong number of costs forward"):
        costs.on(Placement("loop", 2))
    with pytest.raises(InputError, match="no hop cost for the activation edge 1→2"):
        Costs(**{**costs.__dict__}).on(Placement("loop", 2, 2))


@pytest.mark.parametrize("ranks", [0, -2, 10**9])
def test_a_number_of_ranks_that_no_plan_has_is_refused_at_once(ranks: int) -> None:
    with pytest.raises(InputError, match="bad number of ranks of the costs"):
        RankCosts.of(ranks)
