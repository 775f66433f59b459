"""What happened, when: one event per action that ran."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Event(NamedTuple):
    """One action of one rank, as it ran.

    Attributes:
        step: counted from 1.
        kind: the action's kind (``F``, ``RECV_B``, ...) or the name of a phase (``optimizer``, ...).
        stage, microbatch: -1 for a phase.
        begin, end: nanoseconds of ``time.monotonic_ns``, one clock for all ranks of a host. A RECV begins when the
            rank starts to wait for the message and ends when its tensors can be used.
    """

    step: int
    kind: str
    stage: int
    microbatch: int
    begin: int
    end: int

    @property
    def name(self) -> str:
        """The action's text, such as ``2F0``."""
        return self.kind if self.stage < 0 else f"{self.stage}{self.kind}{self.microbatch}"


class Observer(Protocol):
    """Receives the events of this rank, in the order in which they end; those of a fused pair in the plan's."""

    def __call__(self, event: Event) -> None: ...
