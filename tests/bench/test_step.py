from __future__ import annotations

import json
from typing import Any

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
        for figure, least in (("overhead", row["compute_us"]), ("net", row["simulated_us"])):
            per_action = (row["step_us"] - least) / 6
            assert row[f"{figure}_us_per_action"] == pytest.approx(per_action, abs=1e-4 * row["step_us"])
        assert 0 < row["compute_us"] < row["simulated_us"]
    assert code == 1
    assert "pipex bench: gpipe/8x2: ratio of pipex is " in output.err


def rank(pipex: list[float], torch: list[float], compute: list[float], *, torch_right: bool = True) -> dict[str, Any]:
    """What a rank measures, where an F takes 10 µs and a B 30."""
    return {
        "samples": {"pipex": pipex, "torch": torch, "compute": compute},
        "actions": {"F": [10.0, 10.0, 1000.0], "B": [30.0, 2.0, 30.0]},
        "correct": {"pipex": True, "torch": torch_right, "compute": True},
    }


def test_the_slower_rank_makes_the_step_and_the_busiest_the_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [
        rank([900.0, 100.0], [2100.0, 2100.0], [400.0, 400.0]),
        rank([700.0, 700.0], [100.0, 100.0], [410.0, 410.0], torch_right=False),
    ]
    monkeypatch.setattr(step, "launch", lambda *args, **kwargs: [[rank] for rank in ranks])
    pipex, torch_ = step.measure([Case("1f1b", 64, 4, microbatches=10)], Rounds(2, 0))
    assert pipex.figures == {
        "step_us": 800.0,
        "compute_us": 410.0,
        "simulated_us": 11 * (10.0 + 30.0),  # as many as micro-batches, and one of the other stage
        "overhead_us_per_action": 19.5,
        "overhead_ratio": (2100 - 410) / (800 - 410),
        "net_us_per_action": 18.0,
        "net_ratio": (2100 - 440) / (800 - 440),
    }
    assert torch_.figures["overhead_us_per_action"] == 84.5
    assert torch_.figures["net_us_per_action"] == 83.0
    assert (pipex.ratio, torch_.ratio) == (2100 / 800, 1.0)
    assert (pipex.correct, torch_.correct) == (True, False)


@pytest.mark.parametrize(
    ("took", "seen"), [(121.0, set()), (120.0, {"net_ratio"}), (80.0, {"net_ratio", "overhead_ratio"})]
)
def test_an_overhead_too_small_to_be_seen_has_no_ratio(
    took: float, seen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = rank([took], [600.0], [80.0])
    monkeypatch.setattr(step, "launch", lambda *args, **kwargs: [[one], [one]])
    pipex, _ = step.measure([Case("gpipe", 64, 4, microbatches=2)], Rounds(1, 0))
    unseen = {figure for figure in ("net_ratio", "overhead_ratio") if pipex.figures[figure] is None}
    floors = [Floor(pipex.case, "pipex", figure, 1e9) for figure in ("net_ratio", "overhead_ratio")]
    assert len(failures([pipex], floors)) == 2 - len(unseen)
    assert unseen == seen


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
