"""What was measured, and on what: the header of every report."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

import pipex


def environment(threads: int) -> dict[str, str | int | float]:
    """This machine and these versions.

    Args:
        threads: compute threads of each rank that was measured.
    """
    return {
        "cpu": _cpu_model(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "threads_per_rank": threads,
        "load_1min": round(os.getloadavg()[0], 2),  # of runnable processes, this benchmark's own included
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pipex": pipex.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()  # ARM kernels name no model
