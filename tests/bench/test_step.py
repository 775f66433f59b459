from __future__ import annotations

import json

import pytest
import torch

from pipex.bench import step
from pipex.bench.driver import Rounds
from pipex.bench.report import Floor, failures
from pipex.bench.step import Case, TimedStep
from pipex.cli import main
from pipex.errors import InputError
from pipex.transport.solo import SoloWorld

TINY = ["bench", "step", "--shapes", "8x2", "-m", "3", "-n", "2", "-w", "1", "--json"]


def test_both_providers_get_the_gradients_of_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*TINY, "--min-ratio", "gpipe/8x2=1e9"])
    output = capsys.readouterr()
    rows = json.loads(output.out.splitlines()[-1])["rows"]
    assert [(row["case"], row["provider"], row["shape"]) for row in rows] == [
        (case, provider, [2, 8]) for case in ("gpipe/8x2", "1f1b/8x2") for provider in ("pipex", "torch")
    ]
    assert all(row["correct"] is True for row in rows)
    assert all(row["step_us"] == row["p50_us"] > 0 for row in rows)
    for row in rows:  # 3 F and 3 B per rank; all figures are rounded to five digits
        overhead = (row["step_us"] - row["compute_us"]) / 6
        assert row["overhead_us_per_action"] == pytest.approx(overhead, abs=1e-4 * row["step_us"])
    assert code == 1
    assert "pipex bench: gpipe/8x2: ratio of pipex is " in output.err


def test_the_slower_rank_makes_the_step_and_the_busiest_the_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"pipex": True, "torch": True, "compute": True}
    ranks = [
        {"samples": {"pipex": [900.0, 100.0], "torch": [2100.0, 2100.0], "compute": [500.0, 500.0]}, "correct": fine},
        {
            "samples": {"pipex": [700.0, 700.0], "torch": [100.0, 100.0], "compute": [600.0, 600.0]},
            "correct": {**fine, "torch": False},
        },
    ]
    monkeypatch.setattr(step, "launch", lambda *args, **kwargs: [[rank] for rank in ranks])
    pipex, torch_ = step.measure([Case("1f1b", 64, 4, microbatches=10)], Rounds(2, 0))
    assert pipex.figures == {
        "step_us": 800.0,
        "compute_us": 600.0,
        "overhead_us_per_action": 10.0,
        "overhead_ratio": 7.5,
    }
    assert torch_.figures["overhead_us_per_action"] == 75.0
    assert (pipex.ratio, torch_.ratio) == (2100 / 800, 1.0)
    assert (pipex.correct, torch_.correct) == (True, False)


def test_an_overhead_too_small_to_be_seen_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = {
        "samples": {"pipex": [500.0], "torch": [600.0], "compute": [500.0]},
        "correct": {"pipex": True, "torch": True, "compute": True},
    }
    monkeypatch.setattr(step, "launch", lambda *args, **kwargs: [[rank], [rank]])
    pipex, _ = step.measure([Case("gpipe", 64, 4, microbatches=2)], Rounds(1, 0))
    assert pipex.figures["overhead_ratio"] is None
    assert failures([pipex], [Floor(pipex.case, "pipex", "overhead_ratio", 1e9)]) == []


@pytest.mark.parametrize(
    ("error", "tolerance", "correct"),
    [(0.0, 0.0, True), (1e-7, 0.0, False), (1e-7, 1e-5, True), (1e-4, 1e-5, False), (float("nan"), 1e-5, False)],
)
def test_one_wrong_gradient_in_one_step_is_remembered(error: float, tolerance: float, correct: bool) -> None:
    wanted = [torch.ones(3), torch.tensor([1.0, -2.0])]
    errors = iter([0.0, error, 0.0])

    def run() -> list[torch.Tensor]:
        return [wanted[0].clone(), wanted[1] * (1 + next(errors))]

    timed = TimedStep(SoloWorld(torch.device("cpu")), run, wanted, tolerance)
    for _ in range(3):
        timed.sample()
    assert timed.correct is correct


def test_a_missing_gradient_is_noticed() -> None:
    timed = TimedStep(SoloWorld(torch.device("cpu")), list, [torch.ones(3)], 0.0)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        timed.sample()


def test_every_schedule_meets_every_shape() -> None:
    found = step.cases("gpipe,1f1b", "64x4,1024x64", 16)
    assert [case.name for case in found] == ["gpipe/64x4", "gpipe/1024x64", "1f1b/64x4", "1f1b/1024x64"]
    assert found[1] == Case("gpipe", width=1024, samples=64, microbatches=16)


@pytest.mark.parametrize(
    ("schedules", "shapes", "microbatches", "message"),
    [
        ("zb-h1", "64x4", 16, "not a schedule that both sides have; got 'zb-h1'; needed one of gpipe, 1f1b"),
        ("gpipe", "64", 16, "not a shape; got '64'; needed WIDTHxBATCH"),
        ("gpipe", "64x0", 16, "not a shape; got '64x0'"),
        ("gpipe", "64x4", 1, "too few micro-batches; got 1"),
    ],
)
def test_bad_cases_are_named(schedules: str, shapes: str, microbatches: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        step.cases(schedules, shapes, microbatches)
