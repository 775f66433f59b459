"""A GPU, or the simulated driver in its place, as a rank's body sees it: bodies are written once and run on both.

On the simulator tensors are the CPU's. On its NULL stream (``on(None)``) an operation is done when the call returns,
so that torch's own operations may stand between; on other streams only ``stamp`` and ``check`` may.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from simulated_cuda import BLOCK, Simulator
from torch import Tensor

from pipex.transport.device import DeviceWorld

MOST_WORDS = 4096
CYCLES_PER_SECOND = 1.98e9  # the highest clock of an H100; a lower one makes sleeps longer


@dataclass(frozen=True)
class Scale:
    """How much bodies do: messages of a stress and how many of them may be under way, bytes of the largest payload,
    training steps."""

    messages: int
    window: int
    largest: int
    steps: int


class Cuda:
    """This rank's GPU, by torch."""

    scale = Scale(messages=20_000, window=16, largest=64 << 20, steps=300)

    def __init__(self, world: DeviceWorld) -> None:
        self.device = world.device
        self._index = torch.arange(MOST_WORDS, device=self.device)
        self._wrong: dict[Any, Tensor] = {}  # by stream: two would lose each other's counts
        self._graphed = torch.zeros((), dtype=torch.int64, device=self.device)
        self._graphed.add_(0)  # loads the kernel, which a graph's capture may not
        self._capturing = torch.cuda.Stream(self.device)
        self.synchronize()

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if stream is not None else nullcontext()

    def follow(self, later: torch.cuda.Stream, earlier: torch.cuda.Stream) -> None:
        """What is enqueued on ``later`` from here on runs after all that ``earlier`` holds now."""
        later.wait_stream(earlier)

    def is_done(self, stream: torch.cuda.Stream) -> bool:
        return stream.query()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def stamp(self, words: Tensor, message: int) -> None:
        """Fills int64 words on the current stream with what tells the message and the place."""
        torch.bitwise_xor(self._index[: words.numel()], _key(message), out=words)

    def check(self, words: Tensor, message: int) -> None:
        """Counts the words that ``stamp`` would not have written, on the current stream; the host looks at nothing."""
        wrong = (words != (self._index[: words.numel()] ^ _key(message))).sum()
        here = torch.cuda.current_stream(self.device)
        self._wrong[here] = self._wrong[here] + wrong if here in self._wrong else wrong

    def mismatches(self) -> int:
        """Wrong words since the last call."""
        self.synchronize()
        found = sum(int(count) for count in self._wrong.values())
        self._wrong.clear()
        return found

    def outlive(self, tensor: Tensor) -> None:
        """Nothing to do: torch's allocator gives memory to later operations of its stream only."""

    def sleep(self, seconds: float) -> None:
        """Keeps the current stream busy."""
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))

    hold = sleep

    def crowd(self, tensor: Tensor) -> None:
        """Enqueues more than a hardware queue takes, so that the host itself has to wait."""
        for _ in range(5000):
            tensor.add_(1)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Captures a graph on a stream of its own, which is the current one; the graph must do what was captured."""
        graph = torch.cuda.CUDAGraph()
        before = int(self._graphed)
        with torch.cuda.stream(self._capturing):
            graph.capture_begin()
            try:
                self._graphed.add_(1)
                yield
            finally:
                graph.capture_end()
            graph.replay()
        self._capturing.synchronize()
        assert int(self._graphed) == before + 1, "the graph does something else than what was captured"

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def misuses(self) -> list[str]:
        return []


class Simulated:
    """The simulated driver of this rank, which must be a process of its own."""

    scale = Scale(messages=150, window=4, largest=1 << 20, steps=26)

    def __init__(self, world: DeviceWorld, library: Path) -> None:
        self.device = world.device
        self._simulator = Simulator(library)
        self._simulator.start()
        self._current = 0
        self._streams = [0]
        self._seen = 0
        self._alive: list[Tensor] = []
        self._capturing = self.stream()
        type(world).stream = property(lambda _: self._current)  # type: ignore[method-assign,assignment]

    def stream(self) -> int:
        self._streams.append(self._simulator.stream())
        return self._streams[-1]

    @contextmanager
    def on(self, stream: int | None) -> Iterator[None]:
        before, self._current = self._current, stream or 0
        yield
        self._current = before

    def follow(self, later: int, earlier: int) -> None:
        event = self._simulator.event()
        self._simulator.call("cuEventRecord", event, earlier)
        self._simulator.call("cuStreamWaitEvent", later, event, 0)

    def is_done(self, stream: int) -> bool:
        return self._simulator.is_done(stream)

    def synchronize(self) -> None:
        for stream in self._streams:
            self._simulator.synchronize(stream)
        self._alive.clear()

    def stamp(self, words: Tensor, message: int) -> None:
        self._simulator.fill(self._current, words.data_ptr(), words.numel(), message)

    def check(self, words: Tensor, message: int) -> None:
        self._simulator.check(self._current, words.data_ptr(), words.numel(), message)

    def mismatches(self) -> int:
        self.synchronize()
        found, self._seen = self._simulator.mismatches - self._seen, self._simulator.mismatches
        return found

    def outlive(self, tensor: Tensor) -> None:
        """Keeps torch's own memory until the simulated streams are done with it."""
        self._alive.append(tensor)

    def sleep(self, seconds: float) -> None:
        """The setting ``delay`` is there for that."""

    def hold(self, seconds: float) -> None:
        """On a stream of ``stream()``."""
        gate = self._simulator.allocate(8)
        self._simulator.call("simulated_hold", self._current, gate, 1)
        timer = threading.Timer(seconds, setattr, (ctypes.c_uint64.from_address(gate), "value", 1))
        timer.daemon = True
        timer.start()

    def crowd(self, tensor: Tensor) -> None:
        """A queue of the simulator takes whatever comes."""

    @contextmanager
    def capture(self) -> Iterator[None]:
        with self.on(self._capturing):
            self._simulator.capture(self._capturing, True)
            yield
            self._simulator.capture(self._capturing, False)

    def free_memory(self) -> int:
        return (1 << 30) - self.allocated()

    def allocated(self) -> int:
        return BLOCK * self._simulator.mappings

    def misuses(self) -> list[str]:
        return self._simulator.violations


Machine = Cuda | Simulated


def machine_of(world: DeviceWorld, library: str | None) -> Machine:
    """``library``: the simulated driver; None for a GPU."""
    return Cuda(world) if library is None else Simulated(world, Path(library))


def _key(message: int) -> int:
    """64 bits of its own for every message, as a signed number."""
    key = (message + 1) * 0x9E3779B97F4A7C15 % 2**64
    return key - 2**64 if key >= 2**63 else key
