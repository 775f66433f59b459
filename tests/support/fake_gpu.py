"""torch.cuda without a GPU: streams that take virtual time for what is enqueued on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipex.bench import beside, gpu, kernels_seen


class Stream:
    def __init__(self) -> None:
        self.done = 0.0  # when all that was enqueued will be


class Event:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.at = -1.0

    def record(self) -> None:
        self.at = max(self._gpu.now, self._gpu.current.done)

    def elapsed_time(self, end: Event) -> float:
        assert 0 <= self.at <= end.at, "not recorded in this order"
        return end.at - self.at


class FakeGpu:
    """Times are in milliseconds. The host takes none but what is added to ``now``.

    Attributes:
        product: how long a matrix product takes.
        queues: hardware queues; streams on the same one wait for each other.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, product: float = 1.0, queues: int = 32) -> None:
        self.now, self.product = 0.0, product
        self._streams = [Stream() for _ in range(queues)]
        self._made = 0
        self.current = Stream()
        for name, fake in {
            "Stream": self._stream, "stream": self._choose, "Event": lambda enable_timing: Event(self),
            "synchronize": self.synchronize, "device_count": lambda: 1,
            "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)
        for module in (gpu, kernels_seen):
            monkeypatch.setattr(module, "gpu_sleep", lambda cycles: None)
        monkeypatch.setattr(torch, "mm", self._multiply)
        monkeypatch.setattr(beside, "SIDE", 1)
        monkeypatch.setattr(beside, "synchronize", self.synchronize)
        monkeypatch.setattr(beside, "perf_counter", lambda: self.now / 1e3)

    def work(self, milliseconds: float) -> None:
        """Enqueues this much on the current stream."""
        self.current.done = max(self.current.done, self.now) + milliseconds

    def synchronize(self, device: Any = None) -> None:
        self.now = max([self.now, self.current.done, *(stream.done for stream in self._streams)])

    def _stream(self, device: Any) -> Stream:
        self._made += 1
        return self._streams[self._made % len(self._streams)]

    @contextmanager
    def _choose(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def _multiply(self, a: Tensor, b: Tensor, *, out: Tensor) -> None:
        self.work(self.product)
