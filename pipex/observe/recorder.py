"""Keeps the events of a run."""

from __future__ import annotations

from collections import deque

from pipex.events import Event


class Recorder:
    """An observer that keeps the events of the last ``steps`` steps."""

    def __init__(self, steps: int) -> None:
        self._steps: deque[list[Event]] = deque(maxlen=steps)
        self._step = -1

    def __call__(self, event: Event) -> None:
        if event.step != self._step:
            self._step = event.step
            self._steps.append([])
        self._steps[-1].append(event)

    @property
    def events(self) -> list[Event]:
        """All kept events, oldest first."""
        return [event for step in self._steps for event in step]
