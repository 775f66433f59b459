from __future__ import annotations

import json
from typing import Any

import pytest

from pipex.bench import hugging_face
from pipex.bench.driver import Rounds
from pipex.bench.hugging_face import Case
from pipex.cli import main
from pipex.errors import InputError

TINY = ["bench", "hugging-face", "--shapes", "16x8", "-m", "2", "-n", "1", "-w", "0", "--json"]


def test_both_providers_get_the_gradients_and_the_loss_of_the_unsplit_model(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*TINY, "--schedules", "zb-h1", "--min-ratio", "zb-h1/16x8=1e9"])
    output = capsys.readouterr()
    rows = json.loads(output.out.splitlines()[-1])["rows"]
    assert [(row["case"], row["provider"], row["shape"]) for row in rows] == [
        ("zb-h1/16x8", provider, [2, 8, 16]) for provider in ("pipex", "torch")
    ]
    assert all(row["correct"] is True for row in rows)
    assert all(row["p50_us"] > 0 and row["made_ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == pytest.approx(rows[1]["p50_us"] / rows[0]["p50_us"], rel=1e-3)
    assert code == 1
    assert "pipex bench: zb-h1/16x8: ratio of pipex is " in output.err


def test_a_wrong_loss_is_seen_though_gradients_are_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unsplit = hugging_face._unsplit
    monkeypatch.setattr(hugging_face, "_unsplit", lambda *args: (1.001 * unsplit(*args)[0], unsplit(*args)[1]))
    assert main([*TINY, "--schedules", "1f1b"]) == 1
    error = capsys.readouterr().err
    assert "1f1b/16x8: pipex gave a wrong result" in error
    assert "1f1b/16x8: torch gave a wrong result" in error


def test_the_slower_rank_makes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(pipex: float, torch: float, right: bool) -> dict[str, Any]:
        return {
            "samples": {"pipex": [pipex], "torch": [torch]},
            "correct": {"pipex": True, "torch": right},
            "made_ms": {"pipex": pipex, "torch": torch},
        }

    ranks = [rank(100.0, 300.0, True), rank(200.0, 50.0, False)]
    monkeypatch.setattr(hugging_face, "launch", lambda *args, **kwargs: [[rank] for rank in ranks])
    pipex, torch = hugging_face.measure([Case("1f1b", 16, 8, 2)], Rounds(1, 0))
    assert (pipex.time.p50, torch.time.p50, pipex.ratio, torch.ratio) == (200.0, 300.0, 1.5, 1.0)
    assert (pipex.correct, torch.correct) == (True, False)
    assert pipex.figures == {"made_ms": 200.0}


@pytest.mark.parametrize(
    ("schedules", "shapes", "microbatches", "message"),
    [
        ("zbv", "64x32", 8, "not a schedule that is measured here; got 'zbv'; needed one of gpipe, 1f1b, zb-h1"),
        ("1f1b", "64", 8, "not a shape; got '64'; needed WIDTHxTOKENS"),
        ("1f1b", "60x32", 8, "with a width that 8 divides"),
        ("1f1b", "64x32", 1, "too few micro-batches; got 1"),
    ],
)
def test_bad_cases_are_named(schedules: str, shapes: str, microbatches: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hugging_face.cases(schedules, shapes, microbatches)
