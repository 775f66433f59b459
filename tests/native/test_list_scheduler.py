"""The native scheduler refuses what would lead it out of its arrays."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from pipex import _native

SIZES: dict[str, Any] = {
    "rank_of": [0, 1],
    "passing": [2],
    "durations": [[1, 1], [1, 1], [1, 1]],
    "activation_hop": [0],
    "gradient_hop": [0],
    "activation": [1, 1],
    "kept": [1, 1],
    "deferred": [1, 1],
    "limit": [2, 2],
}
TWO_PIPES: dict[str, Any] = {
    "rank_of": [0, 1, 1, 0],
    "passing": [1, 1],
    "durations": [[1] * 4] * 3,
    "activation_hop": [0] * 3,
    "gradient_hop": [0] * 3,
    "activation": [1] * 4,
    "kept": [1] * 4,
    "deferred": [1] * 4,
}
DUE: dict[str, Any] = {
    "start": [0, 0],
    "offset": [[0, 0], [0, 0], [0, 0]],
    "release": [0, 0],
    "cap": [2, 2],
    "look": 0,
    "overrun": 0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"rank_of": [0, 2]},
        {"rank_of": [0, -1]},
        {"rank_of": [0, 0]},
        {"rank_of": [0, 1, 0]},
        {"rank_of": []},
        {"passing": [0]},
        {"passing": []},
        {"passing": [1, 1]},
        {"passing": [1, 1, 1]},
        {**TWO_PIPES, "passing": [3, -1]},
        {**TWO_PIPES, "rank_of": [0, 1, 1, 1]},
        {"durations": [[1, 1], [1, 1], [1]]},
        {"activation_hop": []},
        {"gradient_hop": [0, 0]},
        {"kept": [1]},
        {"deferred": [1]},
        {"limit": []},
        {"limit": [2]},
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, IndexError)):
        _native.SchedulingProblem(**{**SIZES, **change})


@pytest.mark.parametrize("change", [{"start": [0]}, {"offset": [[0, 0], [0, 0], []]}, {"release": []}, {"cap": [1]}])
def test_due_dates_of_another_problem_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of another problem"):
        _native.SchedulingProblem(**SIZES).list_schedule(**{**DUE, **change})


GOOD = [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("codes", [[], GOOD[:-1], [*GOOD, 0], [-1, *GOOD[1:]], [12, *GOOD[1:]]])
def test_orders_of_another_problem_are_refused(codes: list[int]) -> None:
    problem = _native.SchedulingProblem(**SIZES)
    packed = struct.pack(f"={len(codes)}q", *codes)
    with pytest.raises(ValueError, match="of another problem"):
        problem.replay(packed)
    with pytest.raises(ValueError, match="of another problem"):
        problem.improve(packed, 0, 10, False)


def test_a_micro_batch_that_passes_the_other_pipe_is_of_another_problem() -> None:
    problem = _native.SchedulingProblem(**{**SIZES, **TWO_PIPES})
    good = [0, 7, 15, 23, 8, 16, 5, 2, 10, 18, 13, 21]  # rank 0: 0F0 3F1 3I1 3W1 0I0 0W0
    assert problem.replay(struct.pack("=12q", *good)) == (6, 6, (2, 2))
    with pytest.raises(ValueError, match="of another problem"):
        problem.replay(struct.pack("=12q", 1, *good[1:]))  # 0F1


def test_orders_with_an_action_twice_or_on_the_wrong_rank_have_no_replay() -> None:
    problem = _native.SchedulingProblem(**SIZES)
    assert problem.replay(struct.pack("=12q", *GOOD)) is not None
    for wrong in ([0, 0, *GOOD[2:]], [*GOOD[:5], 11, *GOOD[6:11], 9], GOOD[6:] + GOOD[:6], [*GOOD[:-1], 10]):
        packed = struct.pack("=12q", *wrong)
        assert problem.replay(packed) is None
        assert problem.improve(packed, 0, 10, False) == packed


def test_negative_numbers_of_trials_change_nothing() -> None:
    packed = struct.pack("=12q", *GOOD)
    assert _native.SchedulingProblem(**SIZES).improve(packed, 0, -5, True) == packed
