"""Reading traces, and what is seen where the profiler sees no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu

from pipex.bench import kernels_seen
from pipex.bench.kernels_seen import KernelWatch, largest_grids

DEVICE = torch.device("cpu")


def kernel(at: float, name: str, *grid: int) -> dict[str, Any]:
    """As kineto writes one."""
    return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": at, "dur": 2.1,
            "args": {"queued": 0, "device": 0, "context": 1, "stream": 7, "correlation": 12, "registers per thread": 16,
                     "shared memory": 0, "blocks per SM": 0.007576, "warps per SM": 0.007576, "grid": list(grid),
                     "block": [1, 1, 1], "est. achieved occupancy %": 0}}  # fmt: skip


def known(at: float) -> dict[str, Any]:
    return kernel(at, "at::cuda::(anonymous namespace)::spin_kernel(long)", 1, 1, 1)


def other(at: float, category: str, name: str) -> dict[str, Any]:
    arguments = {"device": 0, "context": 1, "stream": 13, "correlation": 15, "bytes": 4096}
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 13, "ts": at, "dur": 1.0, "args": arguments}


def trace(*events: dict[str, Any]) -> dict[str, Any]:
    head = {"ph": "M", "name": "process_name", "ts": 0.0, "pid": 0, "tid": 0, "args": {"name": "python"}}
    return {"schemaVersion": 1, "traceEvents": [head, *events, {"ph": "i", "s": "g", "name": "Record Window End"}]}


COPY = "Memcpy DtoD (Device -> Device)"
SEND = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"


def test_the_largest_kernel_of_each_call_counts() -> None:
    found = trace(
        kernel(1, "fill", 500, 1, 1), known(2), kernel(3, SEND, 16, 1, 1), kernel(4, "scale", 4, 3, 2), known(5),
        kernel(6, "compare", 900, 1, 1), known(7), kernel(8, SEND, 2, 1, 1), known(9), kernel(10, "fill", 800, 1, 1),
    )  # fmt: skip
    assert largest_grids(found, 2) == [24, 2]


def test_events_are_taken_by_their_time() -> None:
    assert largest_grids(trace(kernel(3, SEND, 16, 1, 1), known(5), kernel(9, "fill", 800, 1, 1), known(2)), 1) == [16]


def test_copies_and_fills_of_memory_are_no_kernels() -> None:
    found = trace(
        known(1), other(2, "gpu_memcpy", COPY), other(3, "gpu_memset", "Memset (Device)"),
        other(3.5, "cuda_driver", "cuStreamWriteValue64"), known(4),
    )  # fmt: skip
    assert largest_grids(found, 1) == [0]


def test_nothing_is_known_without_the_known_kernels() -> None:
    assert largest_grids(trace(other(2, "gpu_memcpy", COPY)), 1) == [None]
    assert largest_grids(trace(known(1), kernel(2, SEND, 16, 1, 1)), 1) == [None]  # the end is missing
    assert largest_grids(trace(known(1), known(2), known(3)), 2) == [None, None]


class FakeProfiler:
    """One that sees a GPU: what is launched while it runs."""

    def __init__(self) -> None:
        self.launched: list[dict[str, Any]] = []
        self.running = False

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False

    def launch(self, name: str, *grid: int) -> None:
        if self.running:
            self.launched.append(kernel(float(len(self.launched)), name, *grid))

    def export_chrome_trace(self, path: str) -> None:
        assert not self.running
        Path(path).write_text(json.dumps(trace(*self.launched)))


def test_calls_are_watched_between_known_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    profiler = FakeProfiler()
    monkeypatch.setattr(torch.profiler, "profile", lambda: profiler)
    monkeypatch.setattr(kernels_seen, "gpu_sleep", lambda cycles: profiler.launch("spin_kernel(long)", 1, 1, 1))
    with KernelWatch(DEVICE) as watch:
        watch.watch(lambda: profiler.launch(SEND, 32, 1, 1))
        profiler.launch("fill", 4096, 1, 1)
        watch.watch(lambda: None)
        watch.watch(lambda: profiler.launch("big", 70000, 2, 1))
    profiler.launch("late", 1, 1, 1)
    assert watch.multiprocessors() == [32, 0, 132]  # of 132


def test_a_profiler_that_sees_no_gpu_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    with KernelWatch(DEVICE) as watch:  # torch's own
        watch.watch(lambda: torch.ones(3))
    assert watch.multiprocessors() == [None]
