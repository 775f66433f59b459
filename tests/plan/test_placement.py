"""Which rank holds which stage."""

from __future__ import annotations

import pytest

from pipex.errors import PlanError
from pipex.plan.actions import Kind
from pipex.plan.placement import Edge, Placement, PlacementName


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


def test_neighbours_pieces_and_ends_of_one_pipe() -> None:
    folded = Placement("v", 2, 2)  # stages 0 and 3 on rank 0, 1 and 2 on rank 1
    assert [folded.before(stage) for stage in range(4)] == [None, 0, 1, 2]
    assert [folded.after(stage) for stage in range(4)] == [1, 2, 3, None]
    assert [folded.piece(stage) for stage in range(4)] == [0, 1, 2, 3]
    assert folded.edges == (
        Edge(0, 1, "activation"),
        Edge(2, 3, "activation"),
        Edge(1, 0, "gradient"),
        Edge(3, 2, "gradient"),
    )
    assert folded.edges_within_ranks == (Edge(1, 2, "activation"), Edge(2, 1, "gradient"))
    assert folded.ends == {
        (0, Kind.SEND_F): Edge(0, 1, "activation"),
        (1, Kind.RECV_F): Edge(0, 1, "activation"),
        (2, Kind.SEND_F): Edge(2, 3, "activation"),
        (3, Kind.RECV_F): Edge(2, 3, "activation"),
        (1, Kind.SEND_B): Edge(1, 0, "gradient"),
        (0, Kind.RECV_B): Edge(1, 0, "gradient"),
        (3, Kind.SEND_B): Edge(3, 2, "gradient"),
        (2, Kind.RECV_B): Edge(3, 2, "gradient"),
    }


def test_two_pipes_do_not_touch() -> None:
    both = Placement("bidirectional", 3, 2)
    assert [both.before(stage) for stage in range(6)] == [None, 0, 1, None, 3, 4]
    assert [both.after(stage) for stage in range(6)] == [1, 2, None, 4, 5, None]
    assert [both.piece(stage) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert both.edges_within_ranks == ()
    assert (2, Kind.SEND_F) not in both.ends
    assert (3, Kind.RECV_F) not in both.ends
    assert (3, Kind.RECV_B) in both.ends


def test_a_stage_that_is_not_there_has_no_neighbours() -> None:
    for stage in (-1, 2, 10**9):
        assert Placement("loop", 2).before(stage) is None
        assert Placement("loop", 2).after(stage) is None


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
