"""When an action ran: on the host's clock, or on its GPU's, where the host only enqueues."""

from __future__ import annotations

from time import monotonic_ns
from typing import Any, Protocol

import torch

from pipex.events import Event, Observer


class Times(Protocol):
    """Takes the times of one rank's actions and tells the observer."""

    def start(self) -> None:
        """Call at the start of a step, when nothing of the one before is left to do."""

    def now(self) -> Any:
        """A point in time, for ``note``."""

    def note(self, begin: Any, step: int, kind: str, stage: int, microbatch: int, end: Any = None) -> None:
        """An action ran from ``begin`` until ``end``, or until now."""

    def finish(self) -> None:
        """Call when all that the step has enqueued is done: the observer has its events after that."""


class NoTimes:
    """Nobody observes."""

    def start(self) -> None: ...

    def now(self) -> int:
        return 0

    def note(self, begin: int, step: int, kind: str, stage: int, microbatch: int, end: int | None = None) -> None: ...

    def finish(self) -> None: ...


class HostTimes:
    """The host computes: an action is over when its call returns."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def start(self) -> None: ...

    def now(self) -> int:
        return monotonic_ns()

    def note(self, begin: int, step: int, kind: str, stage: int, microbatch: int, end: int | None = None) -> None:
        self._observer(Event(step, kind, stage, microbatch, begin, monotonic_ns() if end is None else end))

    def finish(self) -> None: ...


class GpuTimes:
    """A GPU computes: events in its stream tell, brought to the host's clock by one point that both have seen. A RECV
    then lasts as long as the stream waits for the message, and a SEND, which another stream makes, nothing."""

    def __init__(self, observer: Observer, device: torch.device) -> None:
        self._observer = observer
        self._device = device
        self._noted: list[tuple[Any, Any, int, str, int, int]] = []
        self._origin: Any = None
        self._origin_ns = 0

    def start(self) -> None:
        self._noted.clear()  # of a step that was not completed
        torch.cuda.synchronize(self._device)
        self._origin = self.now()
        self._origin.synchronize()
        self._origin_ns = monotonic_ns()

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def note(self, begin: Any, step: int, kind: str, stage: int, microbatch: int, end: Any = None) -> None:
        self._noted.append((begin, self.now() if end is None else end, step, kind, stage, microbatch))

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)
        for begin, end, step, kind, stage, microbatch in self._noted:
            self._observer(Event(step, kind, stage, microbatch, self._ns(begin), self._ns(end)))
        self._noted.clear()

    def _ns(self, event: Any) -> int:
        milliseconds: float = self._origin.elapsed_time(event)
        return self._origin_ns + round(1e6 * milliseconds)


def times_of(device: torch.device, observer: Observer | None) -> Times:
    """What takes the times of stages on ``device``."""
    if observer is None:
        return NoTimes()
    return GpuTimes(observer, device) if device.type == "cuda" else HostTimes(observer)
