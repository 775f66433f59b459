"""Which rank holds which stage."""

from __future__ import annotations

import pytest

from pipex.errors import PlanError
from pipex.plan.placement import Placement, PlacementName


@pytest.mark.parametrize(
    ("placement", "ranks_of_stages"),
    [
        (Placement("loop", 3), [0, 1, 2]),
        (Placement("loop", 3, 2), [0, 1, 2, 0, 1, 2]),
        (Placement("loop", 1, 3), [0, 0, 0]),
        (Placement("v", 3, 2), [0, 1, 2, 2, 1, 0]),
        (Placement("wave", 3, 4), [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]),
    ],
)
def test_stages_follow_the_figure(placement: Placement, ranks_of_stages: list[int]) -> None:
    assert placement.stages == len(ranks_of_stages)
    assert [placement.rank_of(stage) for stage in range(placement.stages)] == ranks_of_stages
    for rank in range(placement.ranks):
        assert placement.stages_of(rank) == tuple(s for s, r in enumerate(ranks_of_stages) if r == rank)


@pytest.mark.parametrize(
    ("name", "ranks", "chunks", "problem"),
    [
        ("loop", 0, 1, "too few ranks; got 0; needed at least 1"),
        ("loop", 2, 0, "too few chunks per rank; got 0"),
        ("v", 2, 1, "placement v; got 1; needed exactly 2"),
        ("v", 2, 4, "placement v; got 4; needed exactly 2"),
        ("wave", 2, 3, "placement wave; got 3; needed an even number"),
    ],
)
def test_numbers_that_do_not_fit_the_shape_are_refused(
    name: PlacementName, ranks: int, chunks: int, problem: str
) -> None:
    with pytest.raises(PlanError, match=problem):
        Placement(name, ranks, chunks)
