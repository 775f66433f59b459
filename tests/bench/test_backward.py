"""``pipex bench backward`` runs, checks and keeps its floors."""

from __future__ import annotations

import json

import pytest
import torch

from pipex.backward.tape import Tape
from pipex.cli import main

TINY = ["bench", "backward", "-n", "1", "-w", "0", "--json"]


def test_rows_and_floors(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*TINY, "--min-ratio", "mlp=0.001", "--max-over-whole", "block=1000"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert code == 0
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, provider) for case in ("mlp", "block", "blocks32") for provider in ("whole", "pipex", "torch")
    ]
    assert all(row["correct"] for row in rows)
    assert [row["over_whole"] for row in rows if row["provider"] == "whole"] == [1, 1, 1]


def test_a_missed_ceiling_and_a_wrong_result_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*TINY, "--max-over-whole", "mlp=0.001"]) == 1
    assert "above the ceiling of 0.001" in capsys.readouterr().err

    right = Tape.backward_weight

    def wrong(tape: Tape) -> None:
        for use in tape._uses:
            use.dy = None if use.dy is None else use.dy * (1 + torch.finfo(torch.float32).eps)
        right(tape)

    monkeypatch.setattr(Tape, "backward_weight", wrong)
    assert main(TINY) == 1
    assert "mlp: pipex gave a wrong result" in capsys.readouterr().err
