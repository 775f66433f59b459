"""Runs the folder ``interpreted`` under Triton's interpreter, which computes kernels on the CPU.

Triton decides at its import whether it interprets, and the tests beside this one compile; hence a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"
LATER = {"test_norm.py", "test_products.py", "test_trial.py"}
FILES = [
    pytest.param(path.name, marks=[pytest.mark.long] * (path.name in LATER))
    for path in sorted(FOLDER.glob("test_*.py"))
]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("file", FILES)
def test_kernels_compute_what_their_references_do(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    root = FOLDER.parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    print(done.stdout)
