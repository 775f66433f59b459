"""The same under torchrun, where the ranks are started by somebody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import RANKS, expected, read_diary

pytestmark = [pytest.mark.timing, pytest.mark.long]

PROGRAM = Path(__file__).with_name("torchrun_program.py")


def test_a_killed_rank_is_named_by_all_others(tmp_path: Path) -> None:
    diaries, elastic = tmp_path / "diaries", tmp_path / "elastic"
    diaries.mkdir()
    elastic.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["--monitor-interval", "2"]  # or its agent ends the survivors before they have written what they saw
    done = subprocess.run(
        [*command, str(PROGRAM), str(diaries)], capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(elastic)},
    )  # fmt: skip
    assert done.returncode != 0
    found = [read_diary(diaries / str(rank)) for rank in range(RANKS)]
    victim = found.pop(1)
    for survivor in found:
        place = [1, *expected("zb-h1", 1, ("at", 2, 5))]
        assert (survivor["error"], survivor["place"]) == ("PeerLost", place), done.stderr
        assert survivor["at"] - victim["deed"] < 1.0
