"""The ``pipex`` command, as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipex")


def pipex(
    *arguments: str, code: int = 0, command: tuple[str, ...] = (sys.executable, "-m", "pipex")
) -> tuple[str, str]:
    """Runs the command; returns stdout and stderr."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}  # the bits depend on it
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def last_line(stdout: str) -> dict[str, Any]:
    result = json.loads(stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result
