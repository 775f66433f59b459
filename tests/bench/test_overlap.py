"""``pipex bench overlap`` runs, checks, and tells communication from the schedule's own waiting."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pipex.bench import overlap
from pipex.bench.driver import Rounds
from pipex.bench.training import Case
from pipex.cli import main
from pipex.observe import Event

TINY = ["bench", "overlap", "-n", "2", "-w", "1", "-m", "3", "--json"]


def test_rows_and_floors(capsys: pytest.CaptureFixture[str]) -> None:
    floors = ["--min-ratio", "1f1b/128x64=0.001", "--max-exposed-share", "1f1b/128x64=1,zbv/128x64=0"]
    assert main([*TINY, "--schedules", "1f1b,zbv", *floors]) == 1
    output = capsys.readouterr()
    rows = json.loads(output.out.splitlines()[-1])["rows"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, provider) for case in ("1f1b/128x64", "zbv/128x64") for provider in ("pipex", "torch", "free")
    ]
    assert all(row["correct"] for row in rows)
    for pipex, peer, free in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert 0 <= pipex["exposed_share"] <= pipex["waiting_share"] + 1 <= 2
        for row in (pipex, peer, free):
            assert row["ratio"] == pytest.approx(peer["p50_us"] / row["p50_us"], rel=1e-3)
    assert "zbv/128x64: exposed_share of pipex" in output.err
    assert "1f1b" not in output.err.splitlines()[-1]
    assert not torch.cuda.is_initialized()


def event(kind: str, stage: int, begin: int, end: int) -> Event:
    return Event(1, kind, stage, 0, begin, end)


CASE = Case("1f1b", 2, 1, "cpu", width=8, tokens=4)

# Rank 1 waits for 500 ns of rank 0's forward and then for 100 ns of the message, which takes rank 0 40 ns.
EVENTS = [
    [event("F", 0, 0, 500), event("SEND_F", 0, 500, 540), event("RECV_B", 0, 540, 900), event("B", 0, 900, 1000)],
    [event("RECV_F", 1, 0, 600), event("F", 1, 600, 700), event("B", 1, 700, 850), event("SEND_B", 1, 850, 860)],
]


def answers(losses: list[Any]) -> list[dict[str, Any]]:
    """By rank, as the launch returns them; ``losses`` are pipex's of both ranks and torch's, which the last one has."""
    ranks = [
        {"cases": [{"times": {"pipex": [4.0], "torch": [8.0]}, "losses": {"pipex": [losses[0]], "torch": []},
                    "events": EVENTS[0]}], "wanted": [2.0]},
        {"cases": [{"times": {"pipex": [5.0], "torch": [10.0]}, "losses": {"pipex": [losses[1]], "torch": [losses[2]]},
                    "events": EVENTS[1]}], "wanted": None},
    ]  # fmt: skip
    return json.loads(json.dumps(ranks))


def test_waiting_for_a_peer_that_computes_is_not_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "launch", lambda *_, **__: answers([2.0, 2.0, 2.0]))
    ours, theirs, free = overlap.measure([CASE], Rounds(1, 0))
    assert ours.figures["exposed_share"] == pytest.approx((100 + 10) / 1000)  # rank 0: 40 + 50
    assert ours.figures["waiting_share"] == pytest.approx(600 / 1000)
    assert (ours.time.p50, theirs.time.p50) == (5.0, 10.0)  # of the slower rank
    assert free.time.p50 == pytest.approx((5.0 - 1.0) + 0.5 + 0.1 + 0.15 + 0.1)
    assert (ours.ratio, theirs.ratio, free.ratio) == (2.0, 1.0, pytest.approx(10 / 4.85))
    assert ours.figures["tokens_per_s"] == pytest.approx(4 / 5e-6)


@pytest.mark.parametrize(
    ("losses", "right"),
    [
        ([2.0, 2.0, 2.0 + 1e-6], [True, True]),  # torch sums in another order
        ([2.0, 2.0 + 1e-6, 2.0], [False, True]),
        ([2.0, 2.0, 2.0 + 1e-3], [True, False]),
    ],
)
def test_wrong_losses_are_seen(losses: list[float], right: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "launch", lambda *_, **__: answers(losses))
    assert [row.correct for row in overlap.measure([CASE], Rounds(1, 0))] == [*right, True]


def test_losses_that_torch_does_not_give_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answers([2.0, 2.0, 2.0])
    found[1]["cases"][0]["losses"]["torch"] = []
    monkeypatch.setattr(overlap, "launch", lambda *_, **__: found)
    assert [row.correct for row in overlap.measure([CASE], Rounds(1, 0))] == [True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schedules", "2f2b"], "2f2b"),
        (["--schedules", "naive"], "not a schedule that can stand beside one of torch's; got 'naive'"),
        (["--ranks", "4"], "torch's 1F1B cannot stand beside 1f1b with these sizes"),
    ],
)
def test_what_cannot_be_measured_is_named(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overlap, "launch", None)  # it is said before anything is started
    assert main([*TINY, *options]) == 1
    assert message in capsys.readouterr().err
