"""What the README shows is what the project does."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pipex.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "examples" / "own_model.py"


def test_the_example_in_the_readme_is_the_file() -> None:
    assert EXAMPLE.read_text() in README
    assert len(EXAMPLE.read_text().splitlines()) <= 40


@pytest.mark.long
def test_the_drop_in_s_example_learns() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/drop_in.py"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 2
    assert "examples/drop_in.py" in README


def test_the_fine_tuning_example_learns() -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(ROOT / "examples" / "fine_tuning.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < 0.3


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.mark.parametrize("starter", [[], pytest.param(TORCHRUN, marks=pytest.mark.long)])
def test_the_example_learns(starter: list[str]) -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *starter, str(EXAMPLE)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 4


def test_every_command_of_the_readme_exists() -> None:
    commands = set(re.findall(r"^    (?:torchrun .* -m )?pipex (\w+)", README, re.MULTILINE))
    assert {"train", "bench"} <= commands <= set(COMMANDS)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_figures_are_the_committed_results() -> None:
    render = runpy.run_path(str(ROOT / "bench" / "results" / "render.py"))
    assert render["updated"](README) == README
