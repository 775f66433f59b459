"""Pipelines whose ranks share the GPUs that there are: through device memory, to one process's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_pipeline import data, layers, optimizer, train, train_until_one_is_killed
from torch import nn

import pipex
from pipex.errors import PeerLost
from pipex.runtime.reference import OneProcess

pytestmark = pytest.mark.gpu


def reference() -> list[str]:
    stages = [stage.cuda() for stage in pipex.split_model(layers(), 4)]
    process = OneProcess(stages, 6, nn.functional.mse_loss, optimizer=optimizer, clip_norm=1.0)
    return [process.step(*(tensor.cuda() for tensor in data(step))).hex() for step in range(5)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_exact_pipelines_have_the_bits_of_one_process(family: str, ranks: int) -> None:
    answers = pipex.launch(train, ranks, args=(family, ranks, True), device="cuda")
    wanted = reference()
    for answer in answers:
        assert answer["staged"] is None
        assert answer["device"].startswith("cuda:")
        assert answer["losses"] == wanted
        assert all(nanoseconds >= 0 for nanoseconds in answer["waits"])


def test_fused_pipelines_learn_alike_and_repeat_bit_for_bit() -> None:
    first, again = (pipex.launch(train, 2, args=("zb-h1", 2, None), device="cuda") for _ in range(2))
    assert [answer["losses"] for answer in first] == [answer["losses"] for answer in again]
    for found, wanted in zip(first[0]["losses"], reference(), strict=True):
        assert float.fromhex(found) == pytest.approx(float.fromhex(wanted), rel=1e-3)


def test_a_killed_rank_is_named_on_all_others_and_their_gpu_still_works(tmp_path: Path) -> None:
    with pytest.raises(PeerLost, match="rank 1"):
        pipex.launch(train_until_one_is_killed, 3, args=(str(tmp_path),), device="cuda")
    for rank in (0, 2):
        note = json.loads((tmp_path / str(rank)).read_text())
        assert note["rank"] == 1
        assert note["works"]
        assert note["seconds"] < 2.0
