"""What the README shows is what the project does."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

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


def code_lines(source: str) -> int:
    """Without imports, comments, texts and blank lines."""
    lines = {
        node.lineno + offset
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.Import, ast.ImportFrom))
        for offset in range(1 if hasattr(node, "body") else (node.end_lineno or node.lineno) - node.lineno + 1)
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    }
    return len(lines)


@pytest.mark.parametrize("starter", [[], pytest.param(TORCHRUN, marks=pytest.mark.long)])
def test_the_hugging_face_example_learns_goes_on_and_writes_the_model(starter: list[str], tmp_path: Path) -> None:
    path = ROOT / "examples" / "hugging_face.py"
    source = path.read_text()
    tree = ast.parse(source)
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert code_lines(ast.unparse(train)) <= 30

    def run(program: Path, directory: str) -> list[tuple[int, float, float]]:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore" if starter else "error", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *starter, str(program), str(tmp_path / directory)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found = re.findall(r"epoch (\d+): loss ([0-9.]+), learning rate ([0-9.]+)", done.stdout)
        return [(int(epoch), float(loss), float(rate)) for epoch, loss, rate in found]

    whole = run(path, "whole")
    assert [epoch for epoch, _, _ in whole] == list(range(6))
    assert whole[-1][1] < 0.2 < whole[0][1]
    # Broken off in the middle, and started once more.
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace("for epoch in range(pipeline.steps // 4, epochs)", "for epoch in range(2)"))
    assert run(broken, "part") == whole[:2]
    assert run(path, "part") == whole[2:]
    model, again = (LlamaForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "part"))
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in model.state_dict().items())
    ids = (torch.arange(16)[None] * 3) % 30 + 1  # it has learned to count
    assert model(input_ids=ids, labels=ids).loss < 0.2


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
