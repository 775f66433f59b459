"""Fused pairs (OVERLAP_F_B): the forward of one micro-batch beside the backward of another.

    receives of both ──┬─► forward ───┬─► sends of both
                       └─► backward ──┘

On a CPU in two threads, where a rank has cores for both: an operation takes as many threads as without pairs, since the
bits of a product depend on their number. The backward goes to the other thread, as a backward on a GPU does in plain
torch. There it is autograd's own code alone that runs beside the forward; the first Python function of anybody else's
(a hook, a custom Function, a checkpointed region that runs once more) waits until the forward has ended. So the model's
own code never runs in two threads at once: what it draws, counts and keeps it draws, counts and keeps as without pairs.

On a GPU in two streams, from one thread, which issues the forward first. Autograd runs an operation's backward in the
stream of its forward, so it is stages that have streams: of those on a rank every other one a side stream, for all that
it does, receives and sends included.

    main   ──●── fork ──── forward of stage 0 ──── join ──●──      fork: side waits for what main was given so far
    side         └──────── backward of stage 3 ──────┘             join: main waits for side

torch's allocator gives a block that was freed to the next tensor of the stream on which it was first made, at once, as
the host sees it. That is safe here without ``record_stream``: whatever the two streams were given before a fork, or
after a join, is in one order. Between them the host frees what the forward, then what the backward has let go of, and
only the backward comes after the forward: it could take a block of its own stream's that the other stream's forward is
still reading. Of such blocks a forward has its inputs, which the executor holds until the join, and what stages share,
so that stages that share a module or a parameter do not run at once. What the backward frees is taken after the join.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import permutations
from queue import SimpleQueue
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipex.partition import Stage
from pipex.plan import Action, Kind, Plan
from pipex.runtime.agreement import share
from pipex.runtime.worlds import cores_of
from pipex.torch_internals import any_autocast, dispatch_modes, function_modes, profiling
from pipex.transport.interface import World

Part = Callable[[], tuple[Tensor, ...]]
"""A forward or a backward."""


class Pairs(NamedTuple):
    """What became of the pairs of a rank's last step.

    Attributes:
        at_once: how many ran their forward beside their backward.
        all: how many there are.
        why: what has kept the others, or the last of them, one after the other; empty if nothing has.
    """

    at_once: int
    all: int
    why: str


class Way(Protocol):
    """How the two parts of a pair run at once."""

    def on(self, stage: int) -> AbstractContextManager[None]:
        """Around what a stage does that is not in a pair, and around its sends and receives of one."""

    def end(self) -> None:
        """Of a step, whether it came to its end or not. Nothing runs on."""

    def run(
        self, forward: Part, backward: Part, stages: tuple[int, int], left: Callable[[], None]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], str]:
        """Runs both, and says what they have returned and, if they have not run at once, why.

        Args:
            stages: of the forward and of the backward.
            left: called when the forward has ended and the backward has not.

        Raises:
            BaseException: what the first of the two that failed has raised; the other has ended, too.
        """


def has_some(plan: Plan) -> bool:
    """Whether there are pairs in the plan, on any rank."""
    return any(action.parts for order in plan.orders for action in order)


def agreed_obstacle(world: World, plan: Plan) -> str:
    """Collective: why the plan's pairs are taken apart on all ranks; empty if they stay, or there are none.

    On all, since a pair that is taken apart sends what its forward has made before its backward begins.
    """
    if not has_some(plan):
        return ""
    if plan.asynchronous or plan.recomputed or plan.offloaded:
        return "the plan changes weights within a step, or recomputes or offloads stages"
    return next(filter(None, share(world, "Pipeline(...)", _obstacle(world))), "")


def _obstacle(world: World) -> str:
    if world.device.type == "cuda":
        return ""
    cores, threads = cores_of(world), torch.get_num_threads()
    if cores >= 2 * threads:
        return ""
    if cores == 1:
        return f"rank {world.rank} has one core"
    return (
        f"rank {world.rank} has {cores} cores, and every operation takes {threads}; "
        f"torch.set_num_threads({cores // 2}) before the pipeline is made leaves some for a second one"
    )


def why_apart(action: Action) -> str:
    """Why the parts of this OVERLAP_F_B run one after the other wherever they are; empty if they need not."""
    kinds = [part.kind for part in action.parts]
    if kinds != [Kind.F, Kind.B]:
        return f"{action} is not a forward and a whole backward"
    forward, backward = action.parts
    # What the split backward knows of a stage is no two threads', and autograd's stream is the stage's.
    return f"{action} is of one stage" if forward.stage == backward.stage else ""


def way_of(device: torch.device, stages: Mapping[int, Stage]) -> Way:
    """How pairs of these stages run at once."""
    return TwoStreams(device, stages) if device.type == "cuda" else TwoThreads()


# Two threads.

_AUTOGRADS_OWN = frozenset({
    "torch.autograd", "torch.autograd.graph", "torch.overrides", "torch.fx.experimental.symbolic_shapes", "typing",
    "logging", "contextlib",
})  # fmt: skip
"""Modules whose functions lead into autograd's engine. (Not ``torch.autograd.function``, by which it comes out again.)
Of a torch that needs more, pairs would wait, and a test would say so."""


class _Abandoned(BaseException):
    """The forward has failed, and the code that has waited for its end need not run any more."""


class _Backward:
    """A backward in the other thread."""

    def __init__(self, run: Part) -> None:
        self._run = run
        self.alone = threading.Event()  # the forward has ended
        self.ended = threading.Event()
        self.abandoned = self.waited = False
        self.result: tuple[Tensor, ...] = ()
        self.error: BaseException | None = None

    def __call__(self) -> None:
        _here.backward = self
        try:
            self.result = self._run()
        except BaseException as error:
            self.error = error
        finally:
            del _here.backward
            self.ended.set()

    def finish(self) -> None:
        """Waits for its end, when the forward has come to its own."""
        self.alone.set()
        self.ended.wait()

    def wait(self) -> None:
        """Called in its thread, before code runs that is not to run beside the forward."""
        if not self.alone.is_set():
            self.waited = True
            self.alone.wait()
        if self.abandoned:
            raise _Abandoned


class _Here(threading.local):
    backward: _Backward | None = None  # that this thread runs


_here = _Here()


def _called(frame: FrameType, event: str, _: object) -> None:
    """Python tells of every call in a thread whose profile function this is, before it is made."""
    if event == "call" and _here.backward is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in _AUTOGRADS_OWN and not name.startswith("pipex."):
            _here.backward.wait()


class TwoThreads:
    """The thread for backwards lives for one step: between steps a process has no more threads than before."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._job: _Backward | None = None  # the last one
        self._jobs: SimpleQueue[_Backward | None] = SimpleQueue()
        # torch imports what its backwards need when they need it first, and a thread that waits for a forward must not
        # hold the lock of an import.
        one = torch.ones(1, requires_grad=True)
        torch.autograd.backward(one * one, torch.ones(1))

    def on(self, stage: int) -> AbstractContextManager[None]:
        return _NOWHERE

    def end(self) -> None:
        if self._thread is not None:
            if self._job is not None and not self._job.ended.is_set():  # a Ctrl-C has come at the worst moment
                self._job.abandoned = True
                self._job.alone.set()
            self._job = None
            self._jobs.put(None)
            _outlast(self._thread.join)
            self._thread = None

    def run(
        self, forward: Part, backward: Part, stages: tuple[int, int], left: Callable[[], None]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], str]:
        if why := self._obstacle():
            found = forward()
            left()
            return found, backward(), why
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="pipex backward", daemon=True)
            self._thread.start()
        job = _Backward(backward)
        self._job = job
        self._jobs.put(job)
        try:
            found = forward()
        except BaseException as error:
            job.abandoned = True
            if job.error is not None and isinstance(error, Exception):
                left()
                raise job.error from None  # it was the first
            raise
        else:
            left()
        finally:
            _outlast(job.finish)
        self._job = None
        if job.error is not None:
            raise job.error
        return found, job.result, _WAITED if job.waited else ""

    def _work(self) -> None:
        # A new thread has as many threads for an operation as there are cores, until it is asked: torch gives it the
        # number that was set by then, and some libraries below (oneDNN: a convolution's backward) do not ask.
        torch.get_num_threads()
        sys.setprofile(_called)
        while (job := self._jobs.get()) is not None:
            job()
            del job  # the graph that it holds

    @staticmethod
    def _obstacle() -> str:
        if any_autocast():
            return "autocast is on, and keeps its casts for all threads together"
        if dispatch_modes() or function_modes() or profiling():
            return "a mode or the profiler of torch's is on, and sees one thread alone"
        return ""


_NOWHERE: AbstractContextManager[None] = nullcontext()

_WAITED = "a hook, a custom Function or a checkpointed region in a backward has waited for the forward"


def _outlast(wait: Callable[[], object]) -> None:
    """Waits to the end; a Ctrl-C is raised then."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            wait()
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


# Two streams.


class TwoStreams:
    """Every other stage of the rank has a side stream."""

    def __init__(self, device: torch.device, stages: Mapping[int, Stage]) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._on_side = frozenset(sorted(stages)[1::2])
        parts = {stage: _parts_of(held) for stage, held in stages.items()}
        self._shared = {(a, b) for a, b in permutations(parts, 2) if parts[a] & parts[b]}

    def on(self, stage: int) -> AbstractContextManager[None]:
        return self._forked(self._side) if stage in self._on_side else _NOWHERE

    def end(self) -> None: ...

    def run(
        self, forward: Part, backward: Part, stages: tuple[int, int], left: Callable[[], None]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], str]:
        first, second = stages
        if why := self._obstacle(first, second):
            with self.on(first):
                found = forward()
            left()
            with self.on(second):
                return found, backward(), why
        with self._forked(None):
            with self._stream_of(first):
                found = forward()
            left()
            with self._stream_of(second):
                return found, backward(), ""

    def _obstacle(self, first: int, second: int) -> str:
        if (first, second) in self._shared:
            return f"the stages {first} and {second} share modules or parameters"
        alike = (first in self._on_side) == (second in self._on_side)
        return f"the stages {first} and {second} have one stream" if alike else ""

    def _stream_of(self, stage: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._side) if stage in self._on_side else _NOWHERE

    @contextmanager
    def _forked(self, on: torch.cuda.Stream | None) -> Iterator[None]:
        main = torch.cuda.current_stream(self._device)
        self._side.wait_stream(main)
        with torch.cuda.stream(on):
            yield
        main.wait_stream(self._side)


def _parts_of(stage: Stage) -> set[int]:
    return {id(part) for part in (*stage.layers.modules(), *stage.layers.parameters(), *stage.layers.buffers())}
