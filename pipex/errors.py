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
    ├── CheckpointError       a checkpoint cannot be written or does not fit this model
    ├── ConfigMismatch        ranks were started with different plans, sizes or types
    ├── MessageMismatch       a received tensor is not the announced one
    └── PeerError             another rank ended the run; names rank, stage, action and micro-batch
        ├── PeerLost              its process is gone
        ├── PeerStalled           it is alive but made no progress within the limit
        └── PeerFailed            it raised; carries the type and first line of its exception

Every message says what was got, what was needed and what to do.
"""

from __future__ import annotations


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


class CheckpointError(PipexError):
    """A checkpoint cannot be written, or does not fit this model."""


class ConfigMismatch(PipexError):
    """Ranks were started with different plans, sizes or types; both values are shown."""


class MessageMismatch(PipexError):
    """A received tensor is not the announced one; raised at the receiver before user code sees data."""


class PeerError(PipexError):
    """Another rank ended the run. The same ``rank`` is named on every rank.

    Attributes (None where unknown, such as the action of a rank that died during set-up):
        rank: the culprit.
        problem: what happened to it, as in "rank 2 <problem>".
        step: the step it was in, counted from 1.
        action: what it was doing: a plan action such as ``"2F0"``, or a phase such as ``"optimizer"``.
        stage, microbatch: read off the action, where it has them.
    """

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


class PeerStalled(PeerError):
    """Another rank is alive but made no progress within the limit."""


class PeerFailed(PeerError):
    """Another rank raised; ``remote`` is the type and first line of its exception."""

    def __init__(self, problem: str, *, remote: str, **place: object) -> None:
        self.remote = remote
        super().__init__(f"{problem}: {remote}", **place)  # type: ignore[arg-type]
        self.problem = problem


def headline(error: BaseException) -> str:
    """Type and first line of an exception, as other ranks are told it; never fails, whatever the exception does."""
    try:
        first_line = str(error).partition("\n")[0]
    except Exception:
        first_line = "(its message cannot be printed)"
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
