"""The families on one chain: literal tables, PyTorch's own orders, their docstrings and what they refuse."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from pipex.errors import PlanError
from pipex.plan.actions import Kind
from pipex.plan.families import FAMILIES, build, options_of
from pipex.plan.plan import Plan
from pipex.plan.view.text import plan_view

# Cells without a stage are of the rank's only one.
TABLES: list[tuple[str, int, int, dict[str, int], str]] = [
    ("naive", 3, 2, {}, """
        F0 B0 F1 B1
        F0 B0 F1 B1
        F0 B0 F1 B1
    """),
    ("gpipe", 3, 4, {}, """
        F0 F1 F2 F3 B0 B1 B2 B3
        F0 F1 F2 F3 B0 B1 B2 B3
        F0 F1 F2 F3 B0 B1 B2 B3
    """),
    ("1f1b", 4, 6, {}, """
        F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5
        F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5
        F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5
        F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5
    """),
    ("1f1b", 4, 2, {}, """
        F0 F1 B0 B1
        F0 F1 B0 B1
        F0 F1 B0 B1
        F0 B0 F1 B1
    """),
    ("1f1b", 4, 6, {"warmup": 1}, """
        F0 F1 F2 F3 F4 B0 F5 B1 B2 B3 B4 B5
        F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5
        F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5
        F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5
    """),
    ("1f1b", 4, 6, {"warmup": 3}, """
        F0 F1 F2 F3 F4 F5 B0 B1 B2 B3 B4 B5
        F0 F1 F2 F3 F4 B0 F5 B1 B2 B3 B4 B5
        F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5
        F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5
    """),
    ("interleaved", 2, 4, {}, """
        0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
        1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
    """),
    # The example of Megatron-LM's schedule table: 2 ranks, 2 chunks, 5 micro-batches in groups of 3 (and 2).
    ("interleaved", 2, 5, {"group": 3}, """
        0F0 0F1 0F2 2F0 2F1 2F2 2B0 0F3 2B1 0F4 2B2 2F3 0B0 2F4 0B1 0B2 2B3 2B4 0B3 0B4
        1F0 1F1 1F2 3F0 3B0 3F1 3B1 3F2 3B2 1F3 1B0 1F4 1B1 3F3 1B2 3F4 3B3 3B4 1B3 1B4
    """),
    ("looped-bfs", 2, 3, {}, """
        0F0 0F1 0F2 2F0 2F1 2F2 2B0 2B1 2B2 0B0 0B1 0B2
        1F0 1F1 1F2 3F0 3F1 3F2 3B0 3B1 3B2 1B0 1B1 1B2
    """),
    ("zb-h1", 4, 6, {}, """
        F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5
        F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 I4 W3 I5 W4 W5
        F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5
        F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5
    """),
    ("zb-h1", 4, 2, {}, """
        F0 F1 I0 W0 I1 W1
        F0 F1 I0 I1 W0 W1
        F0 F1 I0 I1 W0 W1
        F0 I0 F1 I1 W0 W1
    """),
    ("zb-h2", 3, 7, {}, """
        F0 F1 F2 F3 F4 I0 W0 F5 I1 W1 F6 I2 W2 I3 W3 I4 W4 I5 W5 I6 W6
        F0 F1 F2 I0 F3 I1 F4 I2 W0 F5 I3 W1 F6 I4 W2 I5 W3 I6 W4 W5 W6
        F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 F5 I5 W1 F6 I6 W2 W3 W4 W5 W6
    """),
    ("zb-h2", 3, 2, {}, """
        F0 F1 I0 W0 I1 W1
        F0 F1 I0 I1 W0 W1
        F0 I0 F1 I1 W0 W1
    """),
    ("interleaved-zb", 2, 3, {}, """
        0F0 0F1 0F2 2F0 2F1 2I0 2W0 2F2 2I1 2W1 2I2 2W2 0I0 0W0 0I1 0W1 0I2 0W2
        1F0 1F1 1F2 3F0 3I0 3F1 3I1 3W0 3F2 3I2 3W1 1I0 3W2 1I1 1W0 1I2 1W1 1W2
    """),
    ("pipedream", 3, 4, {}, """
        F0 F1 F2 B0 UPDATE0 F3 B1 UPDATE1 B2 UPDATE2 B3 UPDATE3
        F0 F1 B0 UPDATE0 F2 B1 UPDATE1 F3 B2 UPDATE2 B3 UPDATE3
        F0 B0 UPDATE0 F1 B1 UPDATE1 F2 B2 UPDATE2 F3 B3 UPDATE3
    """),
    ("pipedream-2bw", 3, 3, {}, """
        F0 F1 F2 B0 B1 B2 UPDATE2
        F0 F1 B0 F2 B1 B2 UPDATE2
        F0 B0 F1 B1 F2 B2 UPDATE2
    """),
    ("pipedream-2bw", 2, 6, {"updates": 3}, """
        F0 F1 B0 F2 B1 UPDATE1 F3 B2 F4 B3 UPDATE3 F5 B4 B5 UPDATE5
        F0 B0 F1 B1 UPDATE1 F2 B2 F3 B3 UPDATE3 F4 B4 F5 B5 UPDATE5
    """),
    ("forward-only", 2, 3, {}, """
        F0 F1 F2
        F0 F1 F2
    """),
    ("forward-only", 2, 8, {"chunks": 2}, """
        0F0 0F1 0F2 0F3 2F0 2F1 2F2 2F3 0F4 0F5 0F6 0F7 2F4 2F5 2F6 2F7
        1F0 1F1 1F2 1F3 3F0 3F1 3F2 3F3 1F4 1F5 1F6 1F7 3F4 3F5 3F6 3F7
    """),
]  # fmt: skip


@pytest.mark.parametrize(("family", "ranks", "microbatches", "options", "table"), TABLES)
def test_orders_equal_the_table(
    family: str, ranks: int, microbatches: int, options: dict[str, int], table: str
) -> None:
    rows = table.strip().splitlines()
    expected = [
        [cell if cell[0].isdigit() else f"{rank}{cell}" for cell in row.split()] for rank, row in enumerate(rows)
    ]
    assert cells(build(family, ranks, microbatches, **options)) == expected


def cells(plan: Plan) -> list[list[str]]:
    return [list(map(str, order)) for order in plan.orders]


def torch_orders(name: str, ranks: int, microbatches: int, chunks: int) -> list[list[str]]:
    """The orders of a schedule of torch.distributed.pipelining; ValueError where it does not accept the sizes."""
    stages: list[Any] = [
        SimpleNamespace(
            stage_index=index, num_stages=ranks * chunks, group_size=ranks, group_rank=0, is_first=index == 0,
            is_last=False, submod=None, group=None, device="cpu", has_backward=True,
        )
        for index in range(chunks)
    ]  # fmt: skip
    order = getattr(schedules, name)(stages, microbatches).pipeline_order
    actions = [[str(action) for action in order[rank] if action is not None] for rank in range(ranks)]
    return [[a for a in row if re.fullmatch("[0-9]+[FIWB][0-9]+", a)] for row in actions]


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("family", "theirs"),
    [("interleaved", "ScheduleInterleaved1F1B"), ("interleaved-zb", "ScheduleInterleavedZeroBubble")],
)
def test_orders_equal_torch_s_where_it_accepts_the_sizes(family: str, theirs: str, ranks: int, chunks: int) -> None:
    refused = set()
    for microbatches in range(1, 2 * ranks + 5):
        try:
            expected = torch_orders(theirs, ranks, microbatches, chunks)
        except ValueError:
            refused.add(microbatches)
            continue
        assert cells(build(family, ranks, microbatches, chunks=chunks)) == expected
    assert refused == {m for m in range(1, 2 * ranks + 5) if m % max(1, m // ranks)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_eager_1f1b_is_torch_s_interleaving_of_one_chunk(ranks: int) -> None:
    for microbatches in (1, ranks, 2 * ranks, 3 * ranks):
        expected = torch_orders("ScheduleInterleaved1F1B", ranks, microbatches, 1)
        assert cells(build("1f1b", ranks, microbatches, warmup=ranks - 1)) == expected


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_looped_bfs_is_torch_s_with_the_backwards_turned_to_rising_order(chunks: int) -> None:
    for ranks, microbatches in [(1, 3), (2, 1), (3, 4), (4, 8)]:
        plan = build("looped-bfs", ranks, microbatches, chunks=chunks)
        turned = [
            [str(a._replace(microbatch=microbatches - 1 - a.microbatch) if a.kind is Kind.B else a) for a in order]
            for order in plan.orders
        ]
        assert turned == torch_orders("ScheduleLoopedBFS", ranks, microbatches, chunks)


def test_one_chunk_of_interleaved_zb_is_zb_h1() -> None:
    for ranks, microbatches in [(1, 1), (3, 2), (4, 6), (8, 24)]:
        plan = build("interleaved-zb", ranks, microbatches, chunks=1)
        assert plan.orders == build("zb-h1", ranks, microbatches).orders


@pytest.mark.parametrize("family", FAMILIES)
def test_the_docstring_of_a_family_has_its_name_and_the_four_blocks_in_order(family: str) -> None:
    lines = docstring(family).splitlines()
    assert lines[0].startswith(f"{family}: ")
    heads = [line.split()[0] for line in lines[1:] if line and not line.startswith(" ")]
    assert heads == ["Time", "Memory", "Constraints", "Source"]
    blocks = lines[lines.index(next(line for line in lines if line.startswith("Time"))) :]
    assert all(line[:12].strip() in ("", *heads) and line[12] != " " for line in blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_in_the_docstring_is_the_plan(family: str) -> None:
    picture = [line.strip() for line in docstring(family).splitlines() if line.startswith("    rank ")]
    ranks, microbatches = len(picture), 1 + max(int(m) for line in picture for m in re.findall("F([0-9]+)", line))
    view = plan_view(build(family, ranks, microbatches), width=116).splitlines()[:-1]
    assert picture == [line.rstrip() for line in view]


def docstring(family: str) -> str:
    module = inspect.getmodule(FAMILIES[family])
    assert module is not None
    assert module.__doc__ is not None
    return module.__doc__


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(PlanError, match="unknown schedule; got '2f2b'; needed one of naive, gpipe, "):
        build("2f2b", 2, 2)
    with pytest.raises(PlanError, match="unknown schedule; got '2f2b'; needed one of naive, "):
        options_of("2f2b")


def test_an_unknown_option_lists_the_known() -> None:
    with pytest.raises(PlanError, match=r"interleaved has no option grup; needed one of chunks, group$"):
        build("interleaved", 2, 4, grup=2)
    with pytest.raises(PlanError, match=r"gpipe has no option group; needed none$"):
        build("gpipe", 2, 4, group=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ranks", "microbatches", "what"), [(0, 4, "ranks"), (-1, 4, "ranks"), (4, 0, "micro-batches")]
)
def test_sizes_below_one_are_refused_with_the_number(family: str, ranks: int, microbatches: int, what: str) -> None:
    got = min(ranks, microbatches)
    with pytest.raises(PlanError, match=f"too few {what} for {family}; got {got}; needed at least 1"):
        build(family, ranks, microbatches)


@pytest.mark.parametrize("family", ["interleaved", "looped-bfs", "interleaved-zb", "forward-only"])
def test_chunks_below_one_are_refused_with_the_number(family: str) -> None:
    with pytest.raises(PlanError, match="too few chunks per rank; got 0; needed at least 1"):
        build(family, 2, 4, chunks=0)


@pytest.mark.parametrize("family", ["naive", "gpipe", "1f1b", "zb-h1", "zb-h2", "pipedream", "pipedream-2bw"])
def test_families_of_one_chunk_refuse_more(family: str) -> None:
    assert build(family, 2, 4, chunks=1) == build(family, 2, 4)
    with pytest.raises(PlanError, match=f"wrong number of chunks per rank for {family}; got 2; needed 1"):
        build(family, 2, 4, chunks=2)


@pytest.mark.parametrize(
    ("family", "ranks", "microbatches", "options", "message"),
    [
        ("1f1b", 4, 8, {"warmup": -1}, "got -1; needed 0 (plain 1F1B) to 3 (eager 1F1B)"),
        ("1f1b", 4, 8, {"warmup": 4}, "got 4; needed 0 (plain 1F1B) to 3 (eager 1F1B)"),
        ("interleaved", 4, 11, {"group": 3}, "interleaved with 4 ranks and 11 micro-batches; got 3; needed 4 to 11, no "
         "last group of fewer than 4; nearest legal: 6"),
        ("interleaved", 4, 11, {"group": 8}, "needed 4 to 11, no last group of fewer than 4; nearest legal: 7 and 11"),
        ("interleaved", 4, 11, {"group": 12}, "needed 4 to 11, no last group of fewer than 4; nearest legal: 11"),
        ("interleaved", 4, 3, {"group": 2}, "got 2; needed 3; nearest legal: 3"),
        ("interleaved", 4, 8, {"group": 0}, "got 0; needed 4 to 8"),
        ("pipedream-2bw", 4, 3, {}, "for pipedream-2bw with 4 ranks; got 3; needed at least 4, as many as ranks"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_with_the_rule_and_the_nearest_legal(
    family: str, ranks: int, microbatches: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        build(family, ranks, microbatches, **options)
