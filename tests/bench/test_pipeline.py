"""``pipex bench pipeline`` runs, checks, and compares schedules with each other and with the simulator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipex.bench import pipeline, training
from pipex.bench.driver import Rounds
from pipex.bench.report import Row
from pipex.bench.training import Case
from pipex.cli import main
from pipex.errors import NativeUnavailable
from pipex.observe import Event

TINY = ["bench", "pipeline", "-n", "2", "-w", "1", "-m", "3", "--json"]
TWO = ["--schedules", "1f1b,zb-h1"]


def test_rows_and_floors(capsys: pytest.CaptureFixture[str]) -> None:
    floors = ["--min-ratio", "zb-h1/128x64=0.001", "--max-misprediction", "1f1b/128x64=0", "--min-speedup",
              "1f1b/128x64=1"]  # fmt: skip
    assert main([*TINY, "--schedules", "1f1b,zb-h1,zbv", *floors]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = report["rows"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (f"{schedule}/128x64", provider)
        for schedule in ("1f1b", "zb-h1", "zbv")
        for provider in ("pipex", "torch-order")
    ]
    assert (report["environment"]["ranks"], report["environment"]["virtual_devices"]) == (2, False)
    assert all(row["correct"] for row in rows)
    assert rows[1]["p50_us"] == rows[3]["p50_us"]  # torch's 1F1B is run once
    for row in rows:
        assert row["shape"] == [3, 64, 128]
        assert row["speedup"] == pytest.approx(rows[0]["p50_us"] / row["p50_us"], rel=1e-3)
        assert 0 < row["bubble"] < 1
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["ratio"] == pytest.approx(theirs["p50_us"] / ours["p50_us"], rel=1e-3)
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--min-ratio=zb-h1/128x64=1.2", "zb-h1/128x64: ratio of pipex is 1.125, below the floor of 1.2"),
        ("--min-speedup=zb-h1/128x64=1.3", "zb-h1/128x64: speedup of pipex is 1.25, below the floor of 1.3"),
        ("--max-misprediction=zb-h1/128x64=0.05", "misprediction of pipex is 0.05469, above the ceiling of 0.05"),
    ],
)
def test_a_missed_floor_fails(
    option: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [replace(row, case=row.case.replace("8x4", "128x64")) for row in literal_rows(monkeypatch)]
    monkeypatch.setattr(pipeline, "measure", lambda *_: rows)
    assert main([*TINY, *TWO]) == 0
    capsys.readouterr()
    assert main([*TINY, *TWO, option]) == 1
    assert message in capsys.readouterr().err


def events(rank: int, *actions: tuple[str, int, int]) -> list[Event]:
    return [Event(1, kind, rank, 0, begin, end) for kind, begin, end in actions]


# Every message takes 20 ns.
WHOLE = [
    events(0, ("F", 0, 100), ("SEND_F", 100, 100), ("RECV_B", 100, 440), ("B", 440, 640)),
    events(1, ("RECV_F", 0, 120), ("F", 120, 220), ("B", 220, 420), ("SEND_B", 420, 420)),
]
SPLIT = [
    events(0, ("F", 0, 100), ("SEND_F", 100, 100), ("RECV_B", 100, 340), ("I", 340, 440), ("W", 440, 540)),
    events(1, ("RECV_F", 0, 120), ("F", 120, 220), ("I", 220, 320), ("SEND_B", 320, 320), ("W", 320, 420)),
]
ACTIONS = {"1f1b": WHOLE, "zb-h1": SPLIT, "torch 1F1B": WHOLE}
TIMES = {"1f1b": (1000.0, 700.0), "zb-h1": (600.0, 800.0), "torch 1F1B": (900.0, 10.0)}
CASES = [Case(schedule, 2, 1, "cpu", width=8, tokens=4) for schedule in ("1f1b", "zb-h1")]


def answers(losses: Mapping[str, float]) -> list[dict[str, Any]]:
    """By rank, as the launch returns them; ``losses`` are those of rank 1 that are not 2."""
    ranks = [
        {
            "times": {name: [times[rank]] for name, times in TIMES.items()},
            "losses": {name: [losses.get(name, 2.0) if rank == 1 else 2.0] for name in TIMES},
            "events": {name: ranks[rank] for name, ranks in ACTIONS.items()},
            "wanted": [2.0] if rank == 0 else None,
        }
        for rank in range(2)
    ]
    return json.loads(json.dumps(ranks))


def literal_rows(monkeypatch: pytest.MonkeyPatch, **losses: float) -> list[Row]:
    found = answers({name.replace("_", " "): loss for name, loss in losses.items()})
    monkeypatch.setattr(pipeline, "launch", lambda *_, **__: found)
    monkeypatch.setattr(pipeline, "torch_plan", lambda *_: CASES[0].plan())  # torch's own wants more micro-batches
    return pipeline.measure(CASES, Rounds(1, 0))


def test_schedules_are_compared_with_1f1b_and_with_what_the_simulator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, split, beside = literal_rows(monkeypatch)
    assert [row.time.p50 for row in (ours, theirs, split, beside)] == [1000.0, 900.0, 800.0, 900.0]  # slower rank
    assert [row.ratio for row in (ours, theirs, split, beside)] == [0.9, 1.0, 1.125, 1.0]
    assert split.figures == {
        "speedup": 1.25,
        "predicted_speedup": pytest.approx(640 / 540),
        "misprediction": pytest.approx(1.25 / (640 / 540) - 1),
        "bubble": pytest.approx(1 - 600 / (2 * 540)),
        "bubble_simulated": pytest.approx(1 - 600 / (2 * 540)),
        "tokens_per_s": pytest.approx(4 / 800e-6),
    }
    assert ours.figures["bubble"] == pytest.approx(1 - 600 / (2 * 640))
    assert (ours.figures["speedup"], ours.figures["misprediction"]) == (1.0, 0.0)
    assert beside.figures["speedup"] == pytest.approx(1000 / 900)
    assert beside.figures["predicted_speedup"] == pytest.approx(1.0)
    assert beside.figures["misprediction"] == pytest.approx(1000 / 900 - 1)


def test_a_step_slower_than_predicted_is_a_misprediction_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TIMES, "zb-h1", (1000.0, 1000.0))
    split = literal_rows(monkeypatch)[2]
    assert split.figures["misprediction"] == pytest.approx(1 - 540 / 640)


def test_bubbles_are_the_run_s_and_the_simulation_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 begins its backward 200 ns late, for no reason that the simulator could know."""
    late = [*WHOLE[1][:2], *events(1, ("B", 420, 620), ("SEND_B", 620, 620))]
    first = [*WHOLE[0][:2], *events(0, ("RECV_B", 100, 640), ("B", 640, 840))]
    monkeypatch.setitem(ACTIONS, "1f1b", [first, late])
    ours = literal_rows(monkeypatch)[0]
    assert ours.figures["bubble"] == pytest.approx(1 - 600 / (2 * 840))
    assert ours.figures["bubble_simulated"] == pytest.approx(1 - 600 / (2 * 640))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("1f1b", [False, True, True, True]), ("torch_1F1B", [True, False, True, False])],
)
def test_wrong_losses_are_seen(wrong: str, right: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = literal_rows(monkeypatch, **{wrong: 2.0 + 1e-15})
    assert [row.correct for row in rows] == right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schedules", "1f1b,2f2b"], "unknown schedule; got '2f2b'"),
        (["--schedules", "1f1b,naive"], "not a schedule that can stand beside one of torch's; got 'naive'"),
        (["--schedules", "gpipe,zb-h1"], "got gpipe,zb-h1; needed 1f1b among them"),
        ([*TWO, "--ranks", "4"], "torch's 1F1B cannot stand beside 1f1b with these sizes"),
        ([*TWO, "--ranks", "0"], "too few ranks for 1f1b; got 0"),
        ([*TWO, "-m", "0"], "too few micro-batches for 1f1b; got 0"),
        ([*TWO, "--virtual-devices"], "CPUs are not shared out"),
        ([*TWO, "--min-speedup", "zbv/128x64=1"], "a floor for a case that is not measured; got zbv/128x64"),
    ],
)
def test_what_cannot_be_measured_is_named(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "launch", None)  # it is said before anything is started
    assert main([*TINY, *options]) == 1
    assert message in capsys.readouterr().err


def test_virtual_devices_are_four(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def not_there(ranks: int) -> None:
        raise NativeUnavailable(f"no service for {ranks} ranks")

    monkeypatch.setattr(training, "shared_among", not_there)
    assert main([*TINY, *TWO, "-m", "4", "--device", "cuda", "--virtual-devices"]) == 1
    assert "no service for 4 ranks" in capsys.readouterr().err
