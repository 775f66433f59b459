"""When actions ran, by the clock of a GPU that does not exist."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipex.observe import Event
from pipex.observe import times as module
from pipex.observe.times import GpuTimes, HostTimes, NoTimes, times_of

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU whose clock stands at ``ms``; an event takes the time at which it is recorded."""
    state = SimpleNamespace(ms=0.0, synchronized=0)

    class FakeEvent:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            assert stream == "the compute stream"
            self.ms = state.ms

        def synchronize(self) -> None: ...

        def elapsed_time(self, later: FakeEvent) -> float:
            return float(later.ms - self.ms)

    def synchronize(device: torch.device) -> None:
        assert device == CUDA
        state.synchronized += 1

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the compute stream")
    monkeypatch.setattr(module, "monotonic_ns", lambda: 5_000_000)
    return state


def test_events_come_at_the_end_of_a_step_in_the_host_s_time(gpu: SimpleNamespace) -> None:
    seen: list[Event] = []
    times = times_of(CUDA, seen.append)
    assert isinstance(times, GpuTimes)
    gpu.ms = 100.0
    times.start()
    gpu.ms = 101.0
    begin = times.now()
    gpu.ms = 103.5
    times.note(begin, 7, "F", 2, 1)
    assert seen == []
    times.finish()
    assert gpu.synchronized == 2
    assert seen == [Event(7, "F", 2, 1, 6_000_000, 8_500_000)]
    times.finish()
    assert len(seen) == 1


def test_what_a_failed_step_has_noted_is_forgotten(gpu: SimpleNamespace) -> None:
    seen: list[Event] = []
    times = times_of(CUDA, seen.append)
    times.start()
    times.note(times.now(), 1, "F", 0, 0)
    times.start()
    times.note(times.now(), 2, "F", 0, 0)
    times.finish()
    assert [event.step for event in seen] == [2]


def test_a_cpu_needs_no_gpu_and_nobody_s_observer_no_clock() -> None:
    seen: list[Event] = []
    times = times_of(torch.device("cpu"), seen.append)
    assert isinstance(times, HostTimes)
    begin = times.now()
    times.note(begin, 1, "F", 0, 0)
    assert seen[0].begin == begin <= seen[0].end
    assert isinstance(times_of(CUDA, None), NoTimes)
