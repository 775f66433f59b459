"""Every error that pipex raises, in one tree.

    PipexError
    ├── InputError            an argument, a file or a batch cannot be used as given (also a ValueError)
    │   └── PlanError         a plan is not a legal schedule
    │       ├── PlanSyntaxError   the text of a plan cannot be read
    │       └── DeadlockError     ranks would wait for each other for ever; names the cycle
    ├── UnsupportedModule     a module that cannot run in a stage; names it
    ├── NativeUnavailable     a compiled part or a driver is missing on this machine
    ├── CudaError             a call of CUDA failed; names the call and CUDA's error
    ├── OutOfSharedMemory     the buffers between ranks cannot be allocated (also a MemoryError)
    ├── OutOfDeviceMemory     the same on a GPU (also a MemoryError)
    ├── StageTooLarge         a stage does not fit into its rank's memory (also a MemoryError)
    ├── CheckpointError       a checkpoint cannot be written or does not fit this model
    ├── ConfigMismatch        ranks were started with different plans, sizes or types
    ├── MessageMismatch       what a stage received is not what comes next in its plan
    └── PeerError             another rank ended the run; names rank, stage, action and micro-batch
        ├── PeerLost              its process is gone
        ├── PeerStalled           it is alive but made no progress within the limit
        └── PeerFailed            it raised; carries the type and first line of its exception

Every message says what was got, what was needed and what to do.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal


class PipexError(Exception):
    """Base of all pipex errors.

    ``problem`` says what is wrong; ``got``, ``needed`` and ``fix`` complete the sentence.
    """

    def __init__(self, problem: str, *, got: object = None, needed: object = None, fix: str | None = None) -> None:
        parts = [problem]
        if got is not None:
            parts.append(f"got {got}")
        if needed is not None:
            parts.append(f"needed {needed}")
        if fix is not None:
            parts.append(fix)
        super().__init__("; ".join(parts))


class InputError(PipexError, ValueError):
    """An argument, a file or a batch cannot be used as given."""


class PlanError(InputError):
    """A plan is not a legal schedule; names rank, position and action."""


class PlanSyntaxError(PlanError):
    """The text of a plan cannot be read."""


class DeadlockError(PlanError):
    """With the given slots the ranks would wait for each other for ever; names the cycle of waits."""


class UnsupportedModule(PipexError):
    """A module cannot run in a stage; names the module and the reason."""


class NativeUnavailable(PipexError):
    """A compiled part of pipex, or a driver that it needs, is missing on this machine."""


class CudaError(PipexError):
    """A call of the CUDA driver or runtime failed; names the call, what it was for, and CUDA's own error."""


class OutOfSharedMemory(PipexError, MemoryError):
    """The buffers between ranks cannot be allocated."""


class OutOfDeviceMemory(PipexError, MemoryError):
    """The buffers between ranks cannot be allocated on a GPU."""


class StageTooLarge(PipexError, MemoryError):
    """The parameters and buffers of a stage do not fit into its rank's memory; says how much would."""


class CheckpointError(PipexError):
    """A checkpoint cannot be written, or does not fit this model."""


class ConfigMismatch(PipexError):
    """Ranks were started with different plans, sizes or types; both values are shown."""


class MessageMismatch(PipexError):
    """What a stage received is not what comes next in its plan: of another plan, edge, step or micro-batch, gradients
    of another number, shape or dtype than the outputs, or bytes that no pipex writes. Raised at the receiver before
    user code sees data."""


Ending = Literal["lost", "stalled", "failed"]
"""How a rank can end the run."""


class PeerError(PipexError):
    """Another rank ended the run. The same ``rank`` is named on every rank.

    Attributes (None where unknown, such as the action of a rank that died during set-up):
        ending: how it ended the run, in one word.
        rank: the culprit.
        problem: what happened to it, as in "rank 2 <problem>".
        step: the step it was in, counted from 1.
        action: what it was doing: a plan action such as ``"2F0"``, or a phase such as ``"optimizer"``.
        stage, microbatch: read off the action, where it has them.
    """

    ending: ClassVar[Ending]

    def __init__(
        self,
        problem: str,
        *,
        rank: int,
        step: int | None = None,
        stage: int | None = None,
        action: str | None = None,
        microbatch: int | None = None,
        fix: str | None = None,
    ) -> None:
        self.rank, self.problem, self.step, self.stage = rank, problem, step, stage
        self.action, self.microbatch = action, microbatch
        place = [f"step {step}"] if step else []
        place += [
            f"{name} {value}"
            for name, value in (("stage", stage), ("action", action), ("micro-batch", microbatch))
            if value is not None
        ]
        super().__init__(f"rank {rank} {problem}" + (f" ({', '.join(place)})" if place else ""), fix=fix)


class PeerLost(PeerError):
    """The process of another rank is gone."""

    ending = "lost"


class PeerStalled(PeerError):
    """Another rank is alive but made no progress within the limit."""

    ending = "stalled"


class PeerFailed(PeerError):
    """Another rank raised; ``remote`` is the type and first line of its exception."""

    ending = "failed"

    def __init__(self, remote: str, **place: Any) -> None:
        self.remote = remote
        super().__init__(f"failed: {remote}", **place)


def peer_error(
    ending: Ending, text: str, *, rank: int, step: int | None = None, stage: int | None = None,
    action: str | None = None, microbatch: int | None = None,
) -> PeerError:  # fmt: skip
    """The error that every rank, and the launcher, raises for the end of a run, whatever the transport.

    Args:
        text: of a failed rank the ``headline`` of its exception; else what completes "rank 2 …".
        rank, step, stage, action, microbatch: as in ``PeerError``; step 0 is none.
    """
    error = next(error for error in (PeerLost, PeerStalled, PeerFailed) if error.ending == ending)
    return error(text, rank=rank, step=step or None, stage=stage, action=action, microbatch=microbatch)


MAX_HEADLINE = 500  # bytes; a run's record of its end has 512 for a text and the 0 behind it (csrc/host/control.hpp)


def headline(error: BaseException) -> str:
    """Type and first line of an exception, as other ranks are told it; never fails, whatever the exception does."""
    try:
        first_line = str(error).partition("\n")[0]
    except Exception:
        first_line = "(its message cannot be printed)"
    text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return text.encode(errors="replace")[:MAX_HEADLINE].decode(errors="ignore")


def outside() -> int:
    """The ``stacklevel`` of the line that has called pipex."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "pipex":
        frame, level = frame.f_back, level + 1
    return level
