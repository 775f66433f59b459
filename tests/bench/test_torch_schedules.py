"""The schedules of torch's that stand beside ours, as plans."""

from __future__ import annotations

import pytest

from pipex.bench.torch_schedules import TORCH_NAMES, torch_plan
from pipex.errors import InputError
from pipex.plan import build, validate


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_torch_s_orders_are_valid_plans_of_the_same_sizes(name: str) -> None:
    for ranks, microbatches in ((2, 4), (2, 8), (3, 6), (4, 8), (4, 12)):
        ours, theirs = build(name, ranks, microbatches), torch_plan(name, ranks, microbatches)
        validate(theirs)
        assert (theirs.placement, theirs.microbatches) == (ours.placement, microbatches)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv"])
def test_schedules_of_one_name_are_one_order(name: str) -> None:
    assert torch_plan(name, 4, 8).orders == build(name, 4, 8).orders


def test_beside_a_zero_bubble_schedule_of_one_chunk_stands_1f1b() -> None:
    assert torch_plan("zb-h1", 4, 8).orders == build("1f1b", 4, 8).orders


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        (
            "hanayo",
            (2, 4),
            "not a schedule that can stand beside one of torch's; got 'hanayo'; needed one of gpipe, 1f",
        ),
        ("zb-h1", (4, 3), r"torch's 1F1B cannot stand beside zb-h1 with these sizes; got Number of microbatches \(3\)"),
    ],
)
def test_what_torch_does_not_have_is_named(name: str, sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        torch_plan(name, *sizes)
