"""``pipex bench backward`` runs, checks and keeps its floors."""

from __future__ import annotations

import json

import pytest
import torch

from pipex.backward.splitter import Splitter
from pipex.backward.tape import Tape
from pipex.bench import backward
from pipex.cli import main

TINY = ["bench", "backward", "-n", "1", "-w", "0", "--json"]


def test_rows_and_floors(capsys: pytest.CaptureFixture[str]) -> None:
    ceilings = ["--max-over-whole", "block=1000", "--max-forward-over-whole", "block=1000,block512=1000"]
    code = main([*TINY, "--min-ratio", "mlp=0.001", *ceilings, "--max-held-share", "block=1,blocks32=1,block512=1"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert code == 0
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, provider)
        for case in ("mlp", "block", "blocks32", "block512")
        for provider in ("whole", "pipex", "torch")
    ]
    assert all(row["correct"] for row in rows)
    whole, pipex, torch_ = ([row for row in rows if row["provider"] == name] for name in ("whole", "pipex", "torch"))
    assert [(row["over_whole"], row["forward_over_whole"], row["held_share"]) for row in whole] == [(1, 1, None)] * 4
    for row, plain in zip(pipex, whole, strict=True):
        assert row["forward_over_whole"] == pytest.approx(row["forward_us"] / plain["forward_us"], rel=1e-3)
    # A plain forward of a block keeps 16 times its input, and per norm and row two numbers, per head and row one.
    assert pipex[1]["held_share"] == pytest.approx(16 / (16 + (2 * 2 + 4) / 64), rel=1e-4)
    assert all(row["held_share"] > 1.6 for row in torch_[1:])


def test_what_waits_in_other_regimes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backward.CASES, "cpu", backward.CASES["cpu"][1:3])
    regimes = ("autocast", "checkpointed")
    floors = ["--min-deferred-share", ",".join(f"block/{regime}=0.95" for regime in regimes)]
    assert (
        main(
            [
                *TINY,
                "--regimes",
                ",".join(regimes),
                *floors,
                "--max-held-share",
                "block/checkpointed=1,block/autocast=1",
            ]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    names = ["block/autocast", "block/checkpointed", "blocks32/autocast"]
    assert [row["case"] for row in rows if row["provider"] == "pipex"] == names
    assert all(row["correct"] for row in rows)
    assert [row["deferred_share"] for row in rows] == [None, 1, 1] * 3

    assert main([*TINY, "--regimes", "fp8"]) == 1
    assert "not a regime; got 'fp8'; needed one of fp32, autocast, checkpointed" in capsys.readouterr().err


def test_a_missed_ceiling_and_a_wrong_result_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backward.CASES, "cpu", backward.CASES["cpu"][:1])
    figures = ("over-whole", "forward-over-whole", "held-share")
    assert main([*TINY, *(word for figure in figures for word in (f"--max-{figure}", "mlp=0.001"))]) == 1
    errors = capsys.readouterr().err
    assert all(f"mlp: {figure.replace('-', '_')} of pipex is " in errors for figure in figures)
    assert errors.count("above the ceiling of 0.001") == 3

    right = Tape.backward_weight

    def wrong(tape: Tape, more: bool) -> None:
        scale = 1 + torch.finfo(torch.float32).eps
        tape._uses = [(use, dy * scale, 0) for use, dy, _ in tape._uses]
        right(tape, more)

    monkeypatch.setattr(Tape, "backward_weight", wrong)
    assert main(TINY) == 1
    assert "mlp: pipex gave a wrong result" in capsys.readouterr().err


def rows_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """What is right of a small case that is measured on the CPU as on a GPU: fused products, in bfloat16."""
    monkeypatch.setattr(Splitter, "fuses", lambda *_: True)
    torch.manual_seed(0)
    case = backward.Case("small", lambda: backward._blocks(1), (2, 16, 64), 1, 3, torch.bfloat16)
    module = case.build().to(case.dtype)
    x, dy = (torch.randn(case.shape).to(case.dtype) for _ in range(2))
    providers = {"whole": backward._Whole, "pipex": backward._Pipex, "torch": backward._Torch}
    sides = {name: backward._Side(module, x, dy, provider, case) for name, provider in providers.items()}
    assert all(side.sample() > 0 and side.forward() > 0 for side in sides.values())
    return backward._correct_on_a_gpu(sides, module, x, dy, case)


def test_gradients_of_several_micro_batches_are_compared_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of_the_gpu(monkeypatch) == {"whole": True, "pipex": True, "torch": True}
    right = Tape.backward_weight
    monkeypatch.setattr(Tape, "backward_weight", lambda tape, more: right(tape, more) if more else None)
    assert rows_of_the_gpu(monkeypatch) == {"whole": True, "pipex": False, "torch": True}


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "backward", "--device", "cuda"]) == 1
    assert "measures on a GPU and there is none" in capsys.readouterr().err
