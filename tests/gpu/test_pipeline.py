"""Pipelines whose ranks share a GPU: through device memory, to one process's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from small_pipeline import data, layers, optimizer, plan_of, train, train_until_one_is_killed
from torch import nn

import pipex
from pipex.errors import PeerLost
from pipex.runtime.reference import OneProcess
from pipex.runtime.reference_versions import OneProcessWithVersions
from tests.gpu.conftest import Site

FAMILIES = ("1f1b", "zb-h1", "zbv")
SHARED_QUEUE = "a stream that waits is not freed by another one"
"""What the self-test may find where there is one hardware queue."""


@lru_cache
def reference(device: str) -> list[str]:
    """The losses of one process with plain autograd."""
    stages = [stage.to(device) for stage in pipex.split_model(layers(), 4)]
    process = OneProcess(stages, 6, nn.functional.mse_loss, optimizer=optimizer, clip_norm=1.0)
    return [process.step(*(tensor.to(device) for tensor in data(step))).hex() for step in range(5)]


def assert_exact(answers: list[list[dict[str, Any]]], *, device: str, may_be_staged: bool = False) -> None:
    """The first answers of every rank, one for each family, have the bits of one process."""
    for rank in answers:
        for family, answer in zip(FAMILIES, rank, strict=False):
            assert answer["staged"] is None or (may_be_staged and SHARED_QUEUE in answer["staged"]), answer["staged"]
            assert answer["device"].startswith(device)
            assert answer["losses"] == reference(device), family
            assert all(nanoseconds >= 0 for nanoseconds in answer["waits"])


def test_exact_pipelines_of_two_ranks_have_the_bits_of_one_process(site: Site) -> None:
    answers = site.launch(train, 2, args=([(family, True) for family in FAMILIES],))
    assert_exact(answers, device="cuda" if site.simulator is None else "cpu")


OTHERS = ("gpipe recomputed", "gpipe offloaded", "dualpipev", "dualpipe", "pipedream")


def test_spared_stages_pairs_copies_and_older_weights_have_the_bits_of_one_process(site: Site) -> None:
    """What has streams or memory of its own on a GPU: copies to the host and back, pairs, versions."""
    answers = site.launch(train, 2, args=([(family, True) for family in OTHERS],))
    device = "cuda" if site.simulator is None else "cpu"
    for rank in answers:
        for family, answer in zip(OTHERS, rank, strict=True):
            plan = plan_of(family, 2)
            stages = [stage.to(device) for stage in pipex.split_model(layers(), plan)]
            process = (
                OneProcessWithVersions(stages, plan, nn.functional.mse_loss, optimizer=optimizer)
                if plan.asynchronous
                else OneProcess(stages, plan, nn.functional.mse_loss, optimizer=optimizer, clip_norm=1.0)
            )
            expected = [process.step(*(tensor.to(device) for tensor in data(step))).hex() for step in range(5)]
            assert answer["losses"] == expected, family


@pytest.fixture(scope="module")
def fused() -> dict[str, Any]:
    """What the fused pipelines of each launch of four ranks gave, by the number of hardware queues."""
    return {}


@pytest.mark.gpu
@pytest.mark.parametrize("connections", ["", "1", "32"])
def test_pipelines_of_four_ranks_complete_with_any_number_of_hardware_queues(
    gpu_site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fused: dict[str, Any],
    record_property: Callable[[str, object], None], connections: str,
) -> None:  # fmt: skip
    """A run that stalls means that a wait stands in a queue before what it waits for."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if connections:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    exact = [(family, True) for family in FAMILIES]
    answers = gpu_site.launch(train, 4, args=([*exact, ("zb-h1", None), ("zbv", None)],))
    record_property("staged", answers[0][0]["staged"])
    assert_exact(answers, device="cuda", may_be_staged=connections == "1")
    fused[connections] = [[answer["losses"] for answer in rank[len(exact) :]] for rank in answers]
    for found in fused[connections][0]:
        pairs = zip(map(float.fromhex, found), map(float.fromhex, reference("cuda")), strict=True)
        assert all(ours == pytest.approx(theirs, rel=1e-3) for ours, theirs in pairs)
    assert ("CUDA_DEVICE_MAX_CONNECTIONS is 1" in capfd.readouterr().err) == (connections == "1")


@pytest.mark.gpu
def test_fused_pipelines_repeat_bit_for_bit_in_other_processes(fused: dict[str, Any]) -> None:
    assert len(fused) > 1, "the launches before have failed"
    assert len(set(map(json.dumps, fused.values()))) == 1


@pytest.mark.gpu
def test_a_killed_rank_is_named_on_all_others_and_their_gpu_still_works(gpu_site: Site, tmp_path: Path) -> None:
    with pytest.raises(PeerLost, match="rank 1"):
        gpu_site.launch(train_until_one_is_killed, 3, args=(str(tmp_path),))
    for rank in (0, 2):
        note = json.loads((tmp_path / str(rank)).read_text())
        assert note["rank"] == 1
        assert note["works"]
        assert note["seconds"] < 2.0


@pytest.mark.gpu
def test_the_train_command_finds_the_bits_of_one_process() -> None:
    root = Path(__file__).parents[2]
    options = ["--device", "cuda", "--ranks", "4", "--schedule", "zb-h1", "--steps", "20", "--check", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "pipex", "train", *options, "--timeout", "20"], cwd=root, capture_output=True, text=True,
        timeout=75, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["steps"], found["identical"]) == (20, True)
