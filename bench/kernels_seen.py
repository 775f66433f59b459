"""How many multiprocessors the kernels take that a call launches, as torch's profiler sees them.

A multiprocessor runs at least one block of a kernel, so a kernel takes at most as many as its grid has blocks. Copies,
fills of memory and operations on single words in a stream are no kernels to the profiler and count as none. So 0 says
that nothing was launched on the multiprocessors; the driver may still do a copy within one GPU by them, which shows in
what a computation beside it loses only.

The profiler may see nothing, as in a container that may not use CUPTI. So a known kernel runs before and after every
call, and what does not lie between two of them was not measured.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipex.torch_internals import gpu_sleep

KNOWN = "spin_kernel"  # what torch.cuda._sleep launches, and nothing else does


class KernelWatch:
    """Calls ``watch`` inside a ``with``, and afterwards says what was seen.

    One for a process: the profiler slows what comes after it, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls = 0
        self._profiler = torch.profiler.profile()  # of all that it can see; the traces differ least that way

    def __enter__(self) -> KernelWatch:
        self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._profiler.stop()

    def watch(self, call: Callable[[], object]) -> None:
        """Calls it, with nothing else on this process's GPU meanwhile."""
        gpu_sleep(1)
        torch.cuda.synchronize(self._device)
        call()
        torch.cuda.synchronize(self._device)
        gpu_sleep(1)
        torch.cuda.synchronize(self._device)
        self._calls += 1

    def multiprocessors(self) -> list[int | None]:
        """For each call, how many its largest kernel takes at most; 0 if it launched none; None: not seen."""
        with tempfile.TemporaryDirectory(prefix="pipex-trace-") as folder:
            path = os.path.join(folder, "trace.json")
            self._profiler.export_chrome_trace(path)
            with open(path, encoding="utf-8") as file:
                blocks = largest_grids(json.load(file), self._calls)
        most = torch.cuda.get_device_properties(self._device).multi_processor_count
        return [None if count is None else min(count, most) for count in blocks]


def largest_grids(trace: Mapping[str, Any], calls: int) -> list[int | None]:
    """Blocks of the largest kernel between the first two known kernels of a trace, the next two, and so on; 0 without
    one. None for all ``calls`` if there are not two known kernels for each."""
    kernels = sorted((event for event in trace["traceEvents"] if event.get("cat") == "kernel"), key=_begin)
    known = [place for place, event in enumerate(kernels) if KNOWN in event["name"]]
    if len(known) != 2 * calls:
        return [None] * calls
    return [
        max((_blocks(event) for event in kernels[first + 1 : last]), default=0)
        for first, last in zip(known[::2], known[1::2], strict=True)
    ]


def _begin(event: Mapping[str, Any]) -> float:
    return float(event["ts"])


def _blocks(event: Mapping[str, Any]) -> int:
    x, y, z = event["args"]["grid"]
    return int(x * y * z)
