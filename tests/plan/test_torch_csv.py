"""torch's CSV, against torch itself: its dumper, its reader, and what it adds for its runtime."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from pipex.bench.torch_schedules import stages_of_rank_0
from pipex.errors import InputError, PlanError, PlanSyntaxError
from pipex.plan import Plan, build, validate
from pipex.plan.actions import Action, Kind, parse_action
from pipex.plan.interop import from_torch_csv, read_plan, to_torch_csv, write_torch_csv
from pipex.plan.interop.sidecar import sidecar_text
from pipex.plan.interop.torch_csv import Format, parse_rows, rows_text
from pipex.plan.interop.torch_versions import Versions
from pipex.plan.placement import Placement

FORMATS: tuple[Format, ...] = ("compute_only", "compute_comms")

COMPUTE = "0F0,0F1,0B0,0B1\r\n1F0,1B0,1F1,1B1\r\n"
COMMS = (
    "0UNSHARD,0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD,0RESHARD\r\n"
    "1UNSHARD,1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1B1,1SEND_B1,1REDUCE_GRAD,1RESHARD\r\n"
)
"""The same in format compute_comms, as torch 2.11 to 2.14 dump it."""

COMMS_2_15 = (
    "0UNSHARD,0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0WAIT_SEND_F0,0RECV_B1,0B1,0WAIT_SEND_F1,"
    "0REDUCE_GRAD,0WAIT_REDUCE_GRAD,0RESHARD\r\n"
    "1UNSHARD,1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1B1,1SEND_B1,"
    "1REDUCE_GRAD,1WAIT_REDUCE_GRAD,1RESHARD,1WAIT_SEND_B0,1WAIT_SEND_B1\r\n"
)
"""As torch 2.15 dumps it."""

# Two stages per rank in a V, as torch 2.15 lowers them: what stages 1 and 2 hand each other stays on the rank, and a
# pair's backward is followed by the wait for what its stage had sent.
V_COMPUTE = "0F0,0F1,3F0,(3F1;3B0)OVERLAP_F_B,3B1,0I0,0W0,0B1\r\n1F0,2F0,1F1,2F1,2B0,1B0,2B1,1B1\r\n"
V_COMMS_2_15 = (
    "0UNSHARD,3UNSHARD,0F0,0SEND_F0,0F1,0SEND_F1,3RECV_F0,3F0,3RECV_F1,(3F1;3B0)OVERLAP_F_B,3SEND_B0,3B1,3SEND_B1,"
    "0RECV_B0,3REDUCE_GRAD,3WAIT_REDUCE_GRAD,3RESHARD,0I0,0WAIT_SEND_F0,0W0,0RECV_B1,0B1,0WAIT_SEND_F1,"
    "0REDUCE_GRAD,0WAIT_REDUCE_GRAD,0RESHARD,3WAIT_SEND_B0,3WAIT_SEND_B1\r\n"
    "1UNSHARD,2UNSHARD,1RECV_F0,1F0,1RECV_F1,2F0,2SEND_F0,1F1,2F1,2SEND_F1,2RECV_B0,2B0,2WAIT_SEND_F0,2RECV_B1,"
    "1B0,1SEND_B0,2B1,2WAIT_SEND_F1,2REDUCE_GRAD,2WAIT_REDUCE_GRAD,2RESHARD,1B1,1SEND_B1,"
    "1REDUCE_GRAD,1WAIT_REDUCE_GRAD,1RESHARD,1WAIT_SEND_B0,1WAIT_SEND_B1\r\n"
)

INSTALLED_KNOWS_WAITS = "WAIT_SEND_F" in {kind.value for kind in schedules._ComputationType}


def dumped(schedule: Any, path: Path, format: Format) -> str:
    schedule._dump_csv(path, format=format)
    return path.read_bytes().decode()


def without_idle_steps(text: str) -> str:
    return re.sub(r"(?m)^,+|,+(?=[,\r])", "", text)


LOOPS = [(1, 1), (1, 3), (2, 1), (2, 2), (2, 5), (3, 2), (3, 4), (4, 1), (4, 3), (8, 2)]  # ranks, chunks
VS = [(ranks, 2) for ranks in (1, 2, 3, 4, 8)]


@pytest.mark.parametrize(
    ("name", "sizes", "placement"),
    [
        ("Interleaved1F1B", LOOPS, "loop"),
        ("LoopedBFS", LOOPS, "loop"),
        ("InterleavedZeroBubble", LOOPS, "loop"),
        ("ZBVZeroBubble", VS, "v"),
        ("DualPipeV", VS, "v"),
    ],
)
def test_what_torch_s_schedules_dump_is_read_proven_and_written_back_byte_for_byte(
    name: str, sizes: list[tuple[int, int]], placement: str, tmp_path: Path
) -> None:
    for ranks, chunks in sizes:
        for microbatches in (2 * ranks, 4 * ranks):
            schedule = getattr(schedules, f"Schedule{name}")(stages_of_rank_0(ranks, chunks), microbatches)
            compute, comms = (dumped(schedule, tmp_path / "dump.csv", format) for format in FORMATS)
            assert rows_text(parse_rows(compute)) == compute
            plan = from_torch_csv(compute)
            validate(plan)
            assert plan.placement.name == (placement if ranks > 1 else "loop")
            assert (plan.placement.ranks, plan.placement.chunks, plan.microbatches) == (ranks, chunks, microbatches)
            assert from_torch_csv(comms) == plan
            assert to_torch_csv(plan) == without_idle_steps(compute)
            assert to_torch_csv(plan, "compute_comms") == comms


def order_of(schedule: Any, path: Path) -> str:
    """The order of a schedule of one stage per rank, which runs without one; dumped by those that run from it."""
    runtime = schedules._PipelineScheduleRuntime(stages_of_rank_0(schedule._num_stages, 1), schedule._n_microbatches)  # type: ignore[no-untyped-call]
    runtime.pipeline_order = schedule._get_pipeline_order()
    return dumped(runtime, path, "compute_only")


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (4, 8)])
def test_torch_s_order_of_gpipe_is_read(ranks: int, microbatches: int, tmp_path: Path) -> None:
    text = order_of(schedules.ScheduleGPipe(*stages_of_rank_0(ranks, 1), microbatches), tmp_path / "dump.csv")
    assert "REDUCE_GRAD" in text
    assert rows_text(parse_rows(text)) == text
    assert from_torch_csv(text).orders == build("gpipe", ranks, microbatches).orders


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8)])
def test_torch_s_order_of_1f1b_is_refused_for_its_last_rank(ranks: int, microbatches: int, tmp_path: Path) -> None:
    # Schedule1F1B runs rightly, but not from this order, in which the last rank counts its F from 1 (to torch 2.15).
    text = order_of(schedules.Schedule1F1B(*stages_of_rank_0(ranks, 1), microbatches), tmp_path / "dump.csv")
    assert rows_text(parse_rows(text)) == text
    plan, ours = from_torch_csv(text), build("1f1b", ranks, microbatches)
    with pytest.raises(PlanError, match=rf"{ranks - 1}F{microbatches}\) names a micro-batch that is not there"):
        validate(plan)
    assert plan.orders[:-1] == ours.orders[:-1]
    right = [a._replace(microbatch=a.microbatch - (a.kind is Kind.F)) for a in plan.orders[-1]]
    assert tuple(right) == ours.orders[-1]


@pytest.mark.skipif(
    "defer_pp_recv" not in inspect.signature(schedules.ScheduleZBVZeroBubble).parameters,
    reason="torch 2.11 has no defer_pp_recv",
)
def test_receives_that_torch_defers_out_of_the_order_sent_are_refused(tmp_path: Path) -> None:
    # Over Gloo, torch 2.13 runs this to its end with wrong gradients: rank 1 takes an activation for a gradient.
    schedule = schedules.ScheduleZBVZeroBubble(stages_of_rank_0(2, 2), 4, defer_pp_recv=True)
    text = dumped(schedule, tmp_path / "dump.csv", "compute_comms")
    problem = "(2RECV_B0) is out of order; got the message of rank 0 at position 8 (0SEND_F2) next"
    with pytest.raises(PlanError, match=re.escape(problem)):
        from_torch_csv(text)


@pytest.mark.parametrize("format", FORMATS)
def test_torch_reads_what_is_written_and_adds_the_same(
    format: Format, random_plans: list[Plan], tmp_path: Path
) -> None:
    named = [build("1f1b", 4, 6), build("zb-h1", 3, 7), build("gpipe", 3, 2)]
    for plan in [*named, *random_plans[::3]]:
        path = tmp_path / "ours.csv"
        write_torch_csv(plan, path, format)
        runtime = schedules._PipelineScheduleRuntime(  # type: ignore[no-untyped-call]
            stages_of_rank_0(plan.placement.ranks, plan.placement.chunks), plan.microbatches
        )
        runtime._load_csv(str(path), format=format)
        assert dumped(runtime, tmp_path / "theirs.csv", "compute_comms") == to_torch_csv(plan, "compute_comms")
        if format == "compute_only":
            assert dumped(runtime, tmp_path / "theirs.csv", format) == to_torch_csv(plan)


def test_the_two_formats_of_every_torch() -> None:
    plan = build("1f1b", 2, 2)
    texts = {
        "2.10.0+cu128": COMMS,
        "2.14.1": COMMS,
        "2.15": COMMS_2_15,
        "2.16.0.dev20261101": COMMS_2_15,
        "3.0": COMMS_2_15,
    }
    for torch, text in texts.items():
        assert to_torch_csv(plan, torch=torch) == COMPUTE
        assert to_torch_csv(plan, "compute_comms", torch) == text
        assert from_torch_csv(text, sidecar_text(plan)) == plan
    assert to_torch_csv(from_torch_csv(V_COMPUTE), "compute_comms", "2.15") == V_COMMS_2_15
    assert rows_text(from_torch_csv(V_COMMS_2_15).orders) == V_COMPUTE


def test_a_csv_is_for_the_installed_torch_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build("1f1b", 2, 2)
    assert to_torch_csv(plan, "compute_comms") == (COMMS_2_15 if INSTALLED_KNOWS_WAITS else COMMS)
    for found, text in {"2.14.1+cpu": COMMS, "2.15.0+cu132": COMMS_2_15}.items():
        monkeypatch.setattr(importlib.metadata, "version", {"torch": found}.__getitem__)
        assert to_torch_csv(plan, "compute_comms") == text
        assert to_torch_csv(plan, "compute_comms", "2.13") == COMMS

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert to_torch_csv(plan, "compute_comms") == COMMS_2_15


@pytest.mark.parametrize("torch", ["", "2", "newest", ">=2.15", "v2.15", "2.x", 2.15])
def test_what_is_no_version_of_torch_is_refused(torch: Any, tmp_path: Path) -> None:
    problem = f"not a version of torch; got {torch!r}; needed one such as '2.15' or '2.14.1'"
    for format in FORMATS:
        with pytest.raises(InputError, match=re.escape(problem)):
            write_torch_csv(build("1f1b", 2, 2), tmp_path / "a.csv", format, torch)
    assert not list(tmp_path.iterdir())


def test_what_is_no_format_is_refused() -> None:
    unknown: Any = "compute"
    problem = "no format of torch's CSV; got 'compute'; needed 'compute_only' or 'compute_comms'"
    with pytest.raises(InputError, match=re.escape(problem)):
        to_torch_csv(build("1f1b", 2, 2), unknown)


def test_torch_loads_the_csv_of_its_version_and_no_other(tmp_path: Path) -> None:
    # torch 2.14 takes the W of 0WAIT_SEND_F0 for a weight gradient; torch 2.15 misses the waits.
    path = tmp_path / "plan.csv"
    for torch in ("2.14", "2.15"):
        write_torch_csv(build("zb-h1", 2, 4), path, "compute_comms", torch)
        runtime = schedules._PipelineScheduleRuntime(stages_of_rank_0(2, 1), 4)  # type: ignore[no-untyped-call]
        if (torch == "2.15") == INSTALLED_KNOWS_WAITS:
            runtime._load_csv(str(path), format="compute_comms")
            assert dumped(runtime, tmp_path / "theirs.csv", "compute_comms") == path.read_bytes().decode()
        else:
            with pytest.raises((AssertionError, ValueError), match=r"Backward Weight|WAIT_REDUCE_GRAD"):
                runtime._load_csv(str(path), format="compute_comms")


@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_comes_back_from_a_csv_and_its_sidecar(format: Format, random_plans: list[Plan]) -> None:
    names = (
        "naive",
        "gpipe",
        "1f1b",
        "interleaved",
        "looped-bfs",
        "zb-h1",
        "zb-h2",
        "zbv",
        "dualpipev",
        "forward-only",
    )
    for plan in [*(build(name, 2, 4) for name in names), *random_plans[::10]]:
        assert from_torch_csv(to_torch_csv(plan, format), sidecar_text(plan)) == plan


def test_without_a_sidecar_everything_but_the_name_is_inferred(random_plans: list[Plan]) -> None:
    for plan in [build("zb-h1", 4, 8), build("forward-only", 3, 2), build("interleaved", 2, 4, chunks=3)]:
        assert from_torch_csv(to_torch_csv(plan)) == dataclasses.replace(plan, family="torch-csv")
    for plan in random_plans[::10]:
        found = from_torch_csv(to_torch_csv(plan))
        assert found.orders == plan.orders
        assert [found.placement.rank_of(s) for s in range(found.placement.stages)] == [
            plan.placement.rank_of(s) for s in range(plan.placement.stages)
        ]
        validate(found)


@pytest.mark.parametrize(
    ("rows", "placement"),
    [
        (["0F0,0B0"], Placement("loop", 1)),
        (["0F0,1F0,1B0,0B0"], Placement("loop", 1, 2)),
        (["0F0,2F0,2B0,0B0", "1F0,3F0,3B0,1B0"], Placement("loop", 2, 2)),
        (["0F0,3F0,3B0,0B0", "1F0,2F0,2B0,1B0"], Placement("v", 2, 2)),
        (["0F0,3F0,4F0,7F0", "1F0,2F0,5F0,6F0"], Placement("wave", 2, 4)),
        (["0F0,5F0,6F0,11F0", "1F0,4F0,7F0,10F0", "2F0,3F0,8F0,9F0"], Placement("wave", 3, 4)),
    ],
)
def test_the_placement_is_the_one_that_fits(rows: list[str], placement: Placement) -> None:
    assert from_torch_csv("".join(row + "\n" for row in rows)).placement == placement


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (",\n", "rank 0 of the CSV has no compute actions; needed a stage on every rank"),
        ("0F0\n,,,\n", "rank 1 of the CSV has no compute actions"),
        ("0F0\n\n1F0\n", "rank 1 of the CSV has no compute actions"),
        ("0F0\n1UNSHARD,1SEND_F0\n", "rank 1 of the CSV has no compute actions"),
        ("0F0,0F1\n0B0\n", "stage 0 is on ranks 0 and 1; needed every stage on one rank"),
        ("1F0\n2F0\n", "the CSV has no stage 0; needed all stages from 0 to 2"),
        ("0F0\n2F0\n", "the CSV has no stage 1; needed all stages from 0 to 2"),
        ("0F0,999999999F0\n", "the CSV has no stage 1; needed all stages from 0 to 999999999"),
        ("0F0,1F0\n2F0\n", "no placement fits the CSV; got 3 stages on 2 ranks"),
        ("1F0\n0F0\n", re.escape("got stages [1] on rank 0; needed 0 (loop)")),
        ("0F0,1F0\n2F0,3F0\n", re.escape("got stages [0, 1] on rank 0; needed 0, 2 (loop) or 0, 3 (v)")),
        (
            "0F0,2F0\n1F0,3F0,4F0,5F0\n",
            re.escape("no placement fits the CSV; got stages [0, 2] on rank 0; needed 0, 2, 4"),
        ),
        ("0B0\n", "too few micro-batches; got 0"),
        ("0F0,1WAIT_REDUCE_GRAD\n1F0\n", re.escape("(1WAIT_REDUCE_GRAD) is of a stage that the rank does not hold")),
        ("0F0,1UNSHARD\n1F0\n", re.escape("rank 0 at position 1 (1UNSHARD) is of a stage that the rank does not hold")),
        ("0F0,2RESHARD\n1F0\n", re.escape("(2RESHARD) is of a stage that the rank does not hold")),
    ],
)
def test_orders_that_fit_no_placement_are_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        from_torch_csv(text)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("0SEND_F1,", "", "rank 0 never runs 0SEND_F1; needed every send and receive, or none"),
        ("1RECV_F1,", "", "rank 1 never runs 1RECV_F1"),
        ("0SEND_F1,", "0SEND_F1,0SEND_F1,", "rank 0 at position 5 (0SEND_F1) was done before"),
        ("0SEND_F1,", "0SEND_F1,0SEND_F2,", "rank 0 at position 5 (0SEND_F2) moves nothing that the plan needs there"),
        ("0SEND_F1,", "0SEND_F1,0SEND_B0,", "rank 0 at position 5 (0SEND_B0) moves nothing that the plan needs there"),
        ("0SEND_F1,", "0SEND_F1,1RECV_F1,", "rank 0 at position 5 (1RECV_F1) moves nothing that the plan needs there"),
        ("0F1,0SEND_F1", "0SEND_F1,0F1", "rank 0 at position 3 (0SEND_F1) comes before what makes the message"),
        ("1B0,1SEND_B0", "1SEND_B0,1B0", "(1SEND_B0) comes before what makes the message"),
        ("0RECV_B0,0B0", "0B0,0RECV_B0", "rank 0 at position 6 (0RECV_B0) comes after what uses the message"),
        ("1RECV_F0,1F0", "1F0,1RECV_F0", "(1RECV_F0) comes after what uses the message"),
        ("0RECV_B0,0B0,0RECV_B1,", "0RECV_B1,0RECV_B0,0B0,", "rank 0 at position 5 (0RECV_B1) is out of order"),
        ("0RECV_B1,0B1,", "", "rank 1 at position 8 (1SEND_B1) has no other end"),
        ("1SEND_B0,1F1,1B1,1SEND_B1,", "1SEND_B0,1F1,", "rank 0 at position 7 (0RECV_B1) has no other end"),
    ],
)
def test_messages_that_do_not_fit_the_compute_actions_are_refused(old: str, new: str, problem: str) -> None:
    changed = COMMS.replace(old, new)
    assert changed != COMMS
    with pytest.raises(PlanError, match=re.escape(problem)):
        from_torch_csv(changed)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("0WAIT_SEND_F1,", "", "rank 0 never waits for 0SEND_F1; needed one wait after it"),
        (",1WAIT_SEND_B1", "", "rank 1 never waits for 1SEND_B1; needed one wait after it"),
        ("1WAIT_REDUCE_GRAD,", "", "rank 1 never waits for 1REDUCE_GRAD; needed one wait after it"),
        ("0WAIT_SEND_F1", "0WAIT_SEND_F0", "rank 0 at position 10 (0WAIT_SEND_F0) has nothing to wait for"),
        (
            "0WAIT_SEND_F1",
            "0WAIT_SEND_B1",
            "(0WAIT_SEND_B1) has nothing to wait for; needed 0SEND_B1 before it, and one",
        ),
        (
            "0WAIT_SEND_F1",
            "0WAIT_SEND_F2",
            "(0WAIT_SEND_F2) has nothing to wait for; needed 0SEND_F2 before it, and one",
        ),
        ("0F0,0SEND_F0", "0F0,0WAIT_SEND_F0,0SEND_F0", "rank 0 at position 2 (0WAIT_SEND_F0) has nothing to wait for"),
        ("0RESHARD", "0WAIT_SEND_F1,0RESHARD", "rank 0 at position 13 (0WAIT_SEND_F1) has nothing to wait for"),
        ("0REDUCE_GRAD,", "", "(0WAIT_REDUCE_GRAD) has nothing to wait for; needed 0REDUCE_GRAD before it"),
        ("0RESHARD", "0WAIT_REDUCE_GRAD", "(0WAIT_REDUCE_GRAD) has nothing to wait for; needed 0REDUCE_GRAD before it"),
        ("0REDUCE_GRAD,0WAIT_REDUCE_GRAD", "0REDUCE_GRAD,0REDUCE_GRAD", "(0REDUCE_GRAD) comes while 0REDUCE_GRAD is"),
    ],
)
def test_waits_that_do_not_fit_what_they_wait_for_are_refused(old: str, new: str, problem: str) -> None:
    changed = COMMS_2_15.replace(old, new)
    assert changed != COMMS_2_15
    with pytest.raises(PlanError, match=re.escape(problem)) as caught:
        from_torch_csv(changed)
    assert str(caught.value).endswith(", since a CSV with WAIT actions is for torch>=2.15")


def test_a_reduction_begins_when_the_one_before_was_waited_for() -> None:
    # torch 2.15 refuses it too: "Rank 0 cannot start REDUCE_GRAD for stage 0 while stage 3 has a pending reduction".
    changed = V_COMMS_2_15.replace("3WAIT_REDUCE_GRAD,", "").replace("0REDUCE_GRAD,", "0REDUCE_GRAD,3WAIT_REDUCE_GRAD,")
    problem = "(0REDUCE_GRAD) comes while 3REDUCE_GRAD is under way; needed 3WAIT_REDUCE_GRAD before it, since a CSV"
    with pytest.raises(PlanError, match=re.escape(problem)):
        from_torch_csv(changed)


def test_waits_may_stand_elsewhere_than_torch_puts_them_by_itself() -> None:
    # As with max_outstanding_sends=1 and defer_reduce_grad_wait of torch 2.15.
    text = V_COMMS_2_15.replace("3WAIT_REDUCE_GRAD,", "").replace("0REDUCE_GRAD,", "3WAIT_REDUCE_GRAD,0REDUCE_GRAD,")
    text = text.replace(",3WAIT_SEND_B0", "").replace("3B1,3SEND_B1", "3B1,3WAIT_SEND_B0,3SEND_B1")
    assert text.count("WAIT") == V_COMMS_2_15.count("WAIT")
    assert from_torch_csv(text) == from_torch_csv(V_COMPUTE)


@pytest.mark.parametrize(
    ("order", "swapped", "problem"),
    [
        ("1RECV_F1,1F1,1SEND_F1,3RECV_F0", "3RECV_F0,1RECV_F1,1F1,1SEND_F1", "(3RECV_F0) is out of order"),
        ("3RECV_F1,3F1,3B1,3SEND_B1,1RECV_B1", "1RECV_B1,3RECV_F1,3F1,3B1,3SEND_B1", "(1RECV_B1) is out of order"),
    ],
)
def test_two_ranks_must_agree_on_the_order_of_their_messages_over_all_stages(
    order: str, swapped: str, problem: str
) -> None:
    rows = "0F0,0F1,2F0,2B0,2F1,2B1,0B0,0B1\n1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1\n"
    text = to_torch_csv(from_torch_csv(rows), "compute_comms")
    # Every message is still received before its user, and in the order of its own edge.
    changed = text.replace(order, swapped)
    assert changed != text
    with pytest.raises(PlanError, match=re.escape(problem)):
        from_torch_csv(changed)


def test_idle_steps_and_actions_for_fsdp_are_read_and_left_out_of_the_plan() -> None:
    text = ",0UNSHARD,0F0,,0B0,,0REDUCE_GRAD,0RESHARD,\r\n"
    assert from_torch_csv(text).orders == ((Action(0, Kind.F, 0), Action(0, Kind.B, 0)),)
    cells = [None, "0UNSHARD", "0F0", None, "0B0", None, "0REDUCE_GRAD", "0RESHARD", None]
    assert parse_rows(text) == (tuple(cell and parse_action(cell) for cell in cells),)


EDITED = {
    "LF": COMPUTE.replace("\r\n", "\n"),
    "CR": COMPUTE.replace("\r\n", "\r"),
    "no final newline": COMPUTE.removesuffix("\r\n"),
    "no final LF": COMPUTE.removesuffix("\n"),
    "mixed": COMPUTE.replace("\r\n", "\n", 1),
    "quoted": COMPUTE.replace("0F1", '"0F1"').replace("1B1", '"1B1"'),
    "all quoted": '"' + COMPUTE.replace(",", '","').replace("\r\n", '"\r\n"').removesuffix('"'),
    "blanks": COMPUTE.replace(",", ", "),
    "blanks before": COMPUTE.replace(",", "\t ,"),
    "blanks in quotes": COMPUTE.replace("0F1", '" 0F1\t"'),
    "blanks after quotes": COMPUTE.replace("0F1", '"0F1" '),
    "an empty line": COMPUTE + "\n",
    "empty lines": COMPUTE + "\r\n\n  \n",
    "a comma at the end": COMPUTE.replace("\r\n", ",\r\n"),
    "idle steps": COMPUTE.replace(",", ', ,"",'),
}


@pytest.mark.parametrize("text", EDITED.values(), ids=EDITED)
def test_what_an_editor_leaves_is_read_as_torch_reads_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.csv").write_bytes(text.encode())
    with (tmp_path / "plan.csv").open(newline="") as file:  # as in torch's _load_csv
        theirs = [[schedules._Action.from_str(cell) for cell in row] for row in csv.reader(file)]
    ours = [[cell and str(cell) for cell in row] for row in parse_rows(text)]
    assert ours == [[cell and str(cell) for cell in row] for row in theirs[: len(ours)]]
    assert not any(any(row) for row in theirs[len(ours) :])
    assert read_plan(tmp_path / "plan.csv") == from_torch_csv(COMPUTE)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "line 1, column 1;"),
        ("\n\r\n", "line 1, column 1;"),
        ("0F0,0B0\n1F", "line 2, column 3;"),
        ("0F0,0B0\n\n1F0,1B0\n1", "line 4, column 2;"),
        ("0F0,  0B\n", "line 1, column 9;"),
        ("0F0\t,0B\n", "line 1, column 8;"),
        ("0F0, 0 B0\n", "line 1, column 7;"),
        ('"0F0"," 0B"\n', "line 1, column 11;"),
        ('"0F0",0"B0\n', "line 1, column 8;"),
        ('"0F0,0B0\n', "line 1, column 1;"),
        ('0F0, "0B0"\n', "line 1, column 6;"),
        ('"0F0"x,0B0\n', "line 1, column 1;"),
        ('"0F""0",0B0\n', "line 1, column 1;"),
        ('"0F0,0B0"\n', "line 1, column 5;"),
        ("0F0\xa0,0B0\n", "line 1, column 4;"),
        ("0F0;0B0\n", "line 1, column 4;"),
        ("0F0,0BW0\n", "line 1, column 6;"),
        ("0F0,(0F1;0B0)OVERLAP_B_F\n", "line 1, column 5;"),
        ("# pipex plan 1\n", "line 1, column 1;"),
        (b"0F0,\xff\n", "line 1, column 5;"),
        (b"\xef\xbb\xbf0F0\n", "line 1, column 1;"),
    ],
)
def test_text_that_is_no_csv_of_torch_is_refused_at_its_place(text: str | bytes, place: str) -> None:
    with pytest.raises(PlanSyntaxError, match=place):
        from_torch_csv(text)


def test_plans_that_torch_s_runtime_would_run_wrongly_are_not_written() -> None:
    two_pipes = from_torch_csv("0F0,1F1,1B1,0B0\n", None)
    two_pipes = dataclasses.replace(two_pipes, placement=Placement("bidirectional", 1, 2), microbatches=2)
    with pytest.raises(PlanError, match="torch's runtime has one copy of the model; got placement bidirectional"):
        to_torch_csv(two_pipes)
    with pytest.raises(PlanError, match="changes the weights after all micro-batches; got update 'microbatch'"):
        to_torch_csv(build("pipedream", 2, 2))
    broken = dataclasses.replace(build("1f1b", 2, 2), microbatches=3)
    with pytest.raises(PlanError, match="never runs 0F2"):
        to_torch_csv(broken)


def test_files_carry_a_plan_and_its_sidecar(tmp_path: Path) -> None:
    plan = build("zb-h1", 2, 3)
    (tmp_path / "plan").write_text(plan.to_text())
    assert read_plan(tmp_path / "plan") == plan
    csv = tmp_path / "plan.csv"
    for format, torch in [("compute_only", None), ("compute_comms", "2.14"), ("compute_comms", "2.15")]:
        write_torch_csv(plan, csv, format, torch)
        assert csv.read_bytes().decode() == to_torch_csv(plan, format, torch)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "plan.csv", "plan.csv.json"]
        said = json.loads((tmp_path / "plan.csv.json").read_text())
        assert said.get("torch") == {None: None, "2.14": "<2.15", "2.15": ">=2.15"}[torch]
        assert read_plan(str(csv)) == plan
    (tmp_path / "plan.csv.json").unlink()
    assert read_plan(csv) == dataclasses.replace(plan, family="torch-csv")


def test_a_sidecar_of_another_plan_is_refused(tmp_path: Path) -> None:
    plan, csv = build("1f1b", 2, 3), tmp_path / "plan.csv"
    write_torch_csv(plan, csv)
    csv.write_text(csv.read_text().replace("0B0,0F2", "0F2,0B0"))
    changed = dataclasses.replace(
        plan, orders=(tuple(map(parse_action, ("0F0", "0F1", "0F2", "0B0", "0B1", "0B2"))), plan.orders[1])
    )
    with pytest.raises(PlanError) as caught:
        read_plan(csv)
    assert str(caught.value) == (
        f"the CSV and its sidecar are of different plans; got digest {changed.digest.hex()}; "
        f"needed {plan.digest.hex()}, as the sidecar says; delete the sidecar if the CSV was changed on purpose"
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"family": "other"}, "of different plans"),
        ({"peak_activations": [2, 2]}, "of different plans"),
        ({"update": "delayed"}, "of different plans"),
        ({"chunks": 2}, "of different plans"),
        ({"chunks": 10**12}, "of different plans"),
        ({"microbatches": 3}, "of different plans"),
        ({"digest": "0" * 32}, "of different plans"),
        ({"family": "my plan"}, "bad family name"),
        ({"ranks": 3}, "wrong number of orders; got 2; needed 3"),
        ({"placement": "v"}, "wrong number of chunks for placement v"),
        ({"placement": "ring"}, "cannot read 'placement' of the sidecar; got 'ring'; needed one of loop, v, wave"),
        ({"update": "daily"}, "cannot read 'update' of the sidecar"),
        ({"pipex plan": 2}, "cannot read 'pipex plan' of the sidecar; got 2; needed 1"),
        ({"ranks": True}, "cannot read 'ranks' of the sidecar; got True; needed int"),
        ({"ranks": 2.0}, "cannot read 'ranks' of the sidecar; got 2.0; needed int"),
        ({"ranks": "2"}, "cannot read 'ranks' of the sidecar; got '2'; needed int"),
        ({"ranks": None}, "cannot read 'ranks' of the sidecar; got None; needed int"),
        ({"peak_activations": [2, -1]}, "cannot read 'peak_activations' of the sidecar"),
        ({"peak_activations": [2, "1"]}, "cannot read 'peak_activations' of the sidecar"),
        ({"torch": "2.15"}, "cannot read 'torch' of the sidecar; got '2.15'; needed one of >=2.15, <2.15"),
        ({"torch": 2.15}, "cannot read 'torch' of the sidecar; got 2.15; needed one of >=2.15, <2.15"),
        ({"torch": None}, "cannot read 'torch' of the sidecar; got None"),
        ({"torch": ["<2.15"]}, "cannot read 'torch' of the sidecar"),
        ({"colour": 1}, "an object with the keys"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(changes: dict[str, Any], problem: str) -> None:
    metadata = {**json.loads(sidecar_text(build("1f1b", 2, 2))), **changes}
    with pytest.raises(PlanError, match=problem):
        from_torch_csv(COMPUTE, json.dumps(metadata))


@pytest.mark.parametrize(
    ("text", "actions", "said"), [(COMMS, "<2.15", ">=2.15"), (COMMS_2_15, ">=2.15", "<2.15")], ids=["2.14", "2.15"]
)
def test_a_sidecar_for_another_torch_is_refused(text: str, actions: str, said: Versions) -> None:
    plan = build("1f1b", 2, 2)
    with pytest.raises(PlanError) as caught:
        from_torch_csv(text, sidecar_text(plan, said))
    assert str(caught.value) == (
        f"the CSV and its sidecar are for different versions of torch; got torch{actions} by the CSV's actions; "
        f"needed torch{said}, as the sidecar says; write the CSV again for the torch that is to load it"
    )
    # Compute actions are for every torch, whatever the sidecar says of another form of the same plan.
    assert from_torch_csv(COMPUTE, sidecar_text(plan, said)) == plan


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"ranks": 1, "ranks": 2}',
        "[" * 100_000,
        "9" * 5000,
        b"\xff\xfe",
        b"\x00",
        "\ufeff{}",
    ],
)
def test_text_that_is_no_sidecar_is_refused(metadata: str | bytes) -> None:
    with pytest.raises(PlanSyntaxError, match="cannot read the sidecar; "):
        from_torch_csv(COMPUTE, metadata)


def test_a_sidecar_that_says_a_thing_twice_is_refused() -> None:
    metadata = sidecar_text(build("1f1b", 2, 2)).replace("{", '{"ranks": 3, ')
    with pytest.raises(PlanSyntaxError, match="cannot read the sidecar; got a key stands twice"):
        from_torch_csv(COMPUTE, metadata)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*/none; got No such file or directory"):
        read_plan(tmp_path / "none")
    with pytest.raises(InputError, match="Is a directory"):
        read_plan(tmp_path)
    with pytest.raises(InputError, match=r"cannot write .*/none/plan\.csv; got No such file or directory"):
        write_torch_csv(build("1f1b", 2, 2), tmp_path / "none" / "plan.csv")
    (tmp_path / "empty").touch()
    with pytest.raises(PlanSyntaxError, match=r"/empty is empty"):
        read_plan(tmp_path / "empty")
