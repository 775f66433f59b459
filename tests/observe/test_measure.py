"""Figures from hand-made events whose answers can be worked out on paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipex.errors import InputError
from pipex.observe import Event, Recorder, measure, write_trace
from pipex.plan import Placement

# Two ranks, one micro-batch, times in µs:
#
#   rank 0   F 0-10  send 10-11                 wait 11-34    B 34-54
#   rank 1   wait 0-14          F 14-24  B 24-30  send 30-31
US = 1000
PLACEMENT = Placement("loop", 2)


def event(kind: str, stage: int, begin: float, end: float, step: int = 1) -> Event:
    return Event(step, kind, stage, 0 if stage >= 0 else -1, int(begin * US), int(end * US))


RANK_0 = [event("F", 0, 0, 10), event("SEND_F", 0, 10, 11), event("RECV_B", 0, 11, 34), event("B", 0, 34, 54)]
RANK_1 = [event("RECV_F", 1, 0, 14), event("F", 1, 14, 24), event("B", 1, 24, 30), event("SEND_B", 1, 30, 31)]


def test_bubbles() -> None:
    figures = measure([RANK_0, RANK_1], PLACEMENT)
    assert figures.bubble_makespan == pytest.approx(1 - (30 + 16) / (2 * 54), abs=1e-12)
    assert figures.bubble_span == pytest.approx(1 - 30 / 54, abs=1e-12)


def test_action_and_stage_times_are_medians_over_steps() -> None:
    later = [event(e.kind, e.stage, e.begin / US + 100, e.end / US + 100 + 4 * (e.kind == "F"), 2) for e in RANK_0]
    same = [event(e.kind, e.stage, e.begin / US + 100, e.end / US + 100, 2) for e in RANK_1]
    figures = measure([RANK_0 + later, RANK_1 + same], PLACEMENT)
    assert figures.action["F", 0] == pytest.approx(12e-6)
    assert figures.stage == {0: pytest.approx(32e-6), 1: pytest.approx(16e-6)}


def test_a_message_takes_from_both_ends_ready_to_usable() -> None:
    assert sorted(measure([RANK_0, RANK_1], PLACEMENT).messages) == [pytest.approx(4e-6), pytest.approx(4e-6)]


def test_shares_add_up() -> None:
    figures = measure([RANK_0, RANK_1], PLACEMENT)
    assert figures.shares[0]["waiting"] == pytest.approx(23 / 54)
    assert figures.shares[0]["other"] == pytest.approx(0, abs=1e-12)
    for shares in figures.shares:
        assert sum(shares.values()) == pytest.approx(1)


def test_parts_of_a_pair_that_ran_at_once() -> None:
    """On one rank: F 0-10, then F 10-16 beside B 12-20, another pair whose B ends first, and B 40-50."""
    pairs = [event("F", 0, 0, 10), event("F", 0, 10, 16), event("B", 1, 12, 20), event("F", 0, 20, 40),
             event("B", 1, 21, 31), event("B", 0, 40, 50)]  # fmt: skip
    figures = measure([pairs], Placement("loop", 1, 2))
    assert figures.overlap == pytest.approx((10 / 14 + 20 / 30) / 2)
    assert figures.bubble_makespan == figures.bubble_span == 0
    assert figures.makespan == pytest.approx(50e-6)
    assert figures.shares[0]["other"] == 0
    assert sum(figures.shares[0].values()) == pytest.approx(64 / 50)
    assert measure([RANK_0, RANK_1], PLACEMENT).overlap == 1


def test_an_incomplete_step_is_left_out() -> None:
    torn = [event("F", 0, 200, 210, step=2)]
    assert measure([RANK_0 + torn, RANK_1], PLACEMENT) == measure([RANK_0, RANK_1], PLACEMENT)


@pytest.mark.parametrize(
    ("ranks", "steps"),
    [([], 0), ([[], []], 0), ([RANK_0, []], 1), ([RANK_0, [event("optimizer", -1, 0, 1)]], 1)],
    ids=["no ranks", "no events", "an idle rank", "no actions"],
)
def test_events_without_a_whole_step_are_refused(ranks: list[list[Event]], steps: int) -> None:
    with pytest.raises(InputError, match=f"nothing to measure; got {steps} steps, none of them with actions on every"):
        measure(ranks, PLACEMENT)


def test_a_clock_that_stood_still_is_no_fault() -> None:
    still = [[e._replace(begin=5, end=5) for e in rank] for rank in (RANK_0, RANK_1)]
    assert measure(still, PLACEMENT).makespan == 0.0


def test_the_recorder_keeps_the_last_steps() -> None:
    recorder = Recorder(steps=2)
    for step in (1, 2, 3):
        for e in RANK_0:
            recorder(e._replace(step=step))
    assert [e.step for e in recorder.events] == [2] * 4 + [3] * 4


def test_trace_has_an_arrow_from_every_send_to_its_receive(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    write_trace(file, [RANK_0, RANK_1], PLACEMENT)
    rows = json.loads(file.read_text())["traceEvents"]
    starts = {row["id"]: row for row in rows if row["ph"] == "s"}
    ends = {row["id"]: row for row in rows if row["ph"] == "f"}
    assert set(starts) == set(ends) == {"1/0F0", "1/1B0"}
    assert (starts["1/0F0"]["pid"], ends["1/0F0"]["pid"]) == (0, 1)
    assert (starts["1/1B0"]["pid"], ends["1/1B0"]["pid"]) == (1, 0)
    names = {row["name"] for row in rows if row["ph"] == "X"}
    assert {"PP:0F0", "PP:1B0", "PP:1RECV_F0"} <= names


def test_a_tensor_that_stays_on_its_rank_is_no_message(tmp_path: Path) -> None:
    # Stages 0 and 3 on rank 0, 1 and 2 on rank 1: what stage 1 hands stage 2 is taken without a message.
    ranks = [
        [event("F", 0, 0, 10), event("SEND_F", 0, 10, 11), event("RECV_F", 3, 11, 34), event("F", 3, 34, 54)],
        [event("RECV_F", 1, 0, 14), event("F", 1, 14, 20), event("RECV_F", 2, 20, 20), event("F", 2, 20, 28)],
    ]
    ranks[1].append(event("SEND_F", 2, 28, 31))
    placement = Placement("v", 2, 2)
    assert measure(ranks, placement).messages == [pytest.approx(6e-6), pytest.approx(4e-6)]
    write_trace(tmp_path / "trace.json", ranks, placement)
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [row["id"] for row in rows if row["ph"] in "sf"] == ["1/0F0", "1/2F0", "1/0F0", "1/2F0"]


def test_a_trace_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write the trace"):
        write_trace(tmp_path / "no" / "trace.json", [], PLACEMENT)
