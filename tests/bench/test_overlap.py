"""``pipex bench overlap`` runs, checks, and tells communication from the schedule's own waiting."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pipex.bench import overlap
from pipex.bench.driver import Rounds
from pipex.cli import main
from pipex.observe import Event

TINY = ["bench", "overlap", "-n", "2", "-w", "1", "-m", "3", "--json"]


def test_rows_and_floors(capsys: pytest.CaptureFixture[str]) -> None:
    floors = ["--min-ratio", "1f1b/128x64=0.001", "--max-exposed-share", "1f1b/128x64=1,zbv/128x64=1"]
    assert main([*TINY, "--schedules", "1f1b,zbv", *floors]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, provider) for case in ("1f1b/128x64", "zbv/128x64") for provider in ("pipex", "free")
    ]
    for pipex, free in zip(rows[::2], rows[1::2], strict=True):
        assert pipex["correct"]
        assert 0 <= pipex["exposed_share"] <= pipex["waiting_share"] + 1 <= 2
        assert pipex["ratio"] == pytest.approx(free["p50_us"] / pipex["p50_us"], rel=1e-3)
    assert main([*TINY, "--schedules", "1f1b", "--max-exposed-share", "1f1b/128x64=0"]) == 1
    assert "above the ceiling of 0" in capsys.readouterr().err


def event(kind: str, stage: int, begin: int, end: int) -> Event:
    return Event(1, kind, stage, 0, begin, end)


def test_waiting_for_a_peer_that_computes_is_not_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 waits for 500 ns of rank 0's forward and then for 100 ns of the message, which takes rank 0 40 ns."""
    ranks = [
        [event("F", 0, 0, 500), event("SEND_F", 0, 500, 540), event("RECV_B", 0, 540, 900), event("B", 0, 900, 1000)],
        [event("RECV_F", 1, 0, 600), event("F", 1, 600, 700), event("B", 1, 700, 850), event("SEND_B", 1, 850, 860)],
    ]
    answers: list[dict[str, Any]] = [{"correct": True, "events": ranks}, {"correct": True, "events": None}]
    monkeypatch.setattr(overlap, "launch", lambda *_, **__: answers)
    ours, free = overlap.run([overlap.Case("1f1b", 2, 1, 8, 4)], Rounds(1, 0), "cpu")
    assert ours.time.p50 == pytest.approx(1.0)
    assert ours.figures["exposed_share"] == pytest.approx((100 + 10) / 1000)  # rank 0: 40 + 50
    assert ours.figures["waiting_share"] == pytest.approx(600 / 1000)
    assert free.time.p50 == pytest.approx(0.5 + 0.1 + 0.15 + 0.1)


def test_a_wrong_loss_is_seen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_as_one_process", lambda *_: False)
    assert main([*TINY, "--schedules", "1f1b", "--ranks", "1"]) == 1
    assert "gave a wrong result" in capsys.readouterr().err
    assert not torch.cuda.is_initialized()


def test_an_unknown_schedule_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--schedules", "2f2b"]) == 1
    assert "2f2b" in capsys.readouterr().err
