"""How much a matrix product slows while messages flow beside it.

On both ranks the same product runs ``PRODUCTS`` times in a row on one stream: by turns with nothing beside it, and
while a burst of messages goes on on another stream. Both ranks compute, in both cases, since a message may cost the GPU
of its sender something, that of its receiver, or, where they share one, both.

    products   ▕▁▁▁▕▁▁▁▕▁▁▁▕▁▁▁▕▁▁▁▕▁▁▁▕▁▁▁▕
    messages        ▕▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▕              from handing over the first until the last has arrived
    count                ▕▁▁▁▕▁▁▁▕▁▁▁▕               all of whose time messages were flowing, by this GPU's events

Where fewer than ``LEAST`` count, the messages ended too early, and the sample is repeated with twice as many. That is
agreed between the ranks, so that each always sends as many as the other one expects; products wait for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from pipex.bench.bursts import Bursts
from pipex.bench.p2p_ends import End, synchronize
from pipex.transport.interface import World

SIDE = 4096  # of the square bfloat16 factors: a few hundred microseconds of all multiprocessors, bound by computing
PRODUCTS = 16
LEAST = PRODUCTS // 2
SAMPLES, WARMUPS = 5, 1
PATIENCE = 1.0
"""Seconds that a sample may take and still be repeated with more messages."""

ENOUGH, MORE, HOPELESS = b"enough", b"more", b"hopeless"


@dataclass(frozen=True)
class Timeline:
    """One rank's GPU during a sample, in milliseconds.

    Attributes:
        ends: when the first product began, and when each ended.
        messages: when the first message was handed over and when the last had arrived.
    """

    ends: Sequence[float]
    messages: tuple[float, float]

    @property
    def all(self) -> list[float]:
        """How long each product took."""
        return [end - begin for begin, end in pairwise(self.ends)]

    @property
    def beside(self) -> list[float]:
        """How long each took beside which messages flowed from its begin to its end."""
        first, last = self.messages
        return [end - begin for begin, end in pairwise(self.ends) if first <= begin and end <= last]


class Products:
    """The products of this rank."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._computing = torch.cuda.Stream(world.device)  # type: ignore[no-untyped-call]
        self._messages = torch.cuda.Stream(world.device)  # type: ignore[no-untyped-call]
        self._a, self._b = (torch.randn(SIDE, SIDE, device=world.device, dtype=torch.bfloat16) for _ in range(2))
        self._out = torch.empty_like(self._a)

    def run(self, transfer: Callable[[], Tensor | None]) -> tuple[Timeline, Tensor | None]:
        """All products, with ``transfer`` beside them on another stream, and what that returned. Collective."""
        began, *ended = (_event() for _ in range(PRODUCTS + 1))
        first, last = _event(), _event()
        synchronize(self._world.device)
        self._world.exchange(b"")
        with torch.cuda.stream(self._computing):
            began.record()
            for event in ended:
                torch.mm(self._a, self._b, out=self._out)
                event.record()
        self._world.exchange(b"")  # the first message must not wait for a rank that still enqueues products
        with torch.cuda.stream(self._messages):
            first.record()
            received = transfer()
            last.record()
        synchronize(self._world.device)
        self._world.exchange(b"")
        ends = [0.0, *(began.elapsed_time(event) for event in ended)]
        return Timeline(ends, (began.elapsed_time(first), began.elapsed_time(last))), received


class Beside:
    """Samples with messages beside the products, and with nothing, by turns. All methods are collective."""

    def __init__(self, world: World, products: Products, bursts: Bursts, ends: Mapping[str, End]) -> None:
        self._world, self._products, self._bursts, self._ends = world, products, bursts, ends
        self._messages: dict[str, int | None] = dict.fromkeys(ends, bursts.messages)  # of a sample; None: hopeless

    def slowdowns(self) -> dict[str, float | None]:
        """By provider, the median product beside its messages over the median one beside nothing, less 1; this rank's.

        None where this rank has no messages, and where no number of messages lasts as long as the products.
        """
        alone: list[float] = []
        beside: dict[str, list[float]] = {name: [] for name in self._ends}
        for number in range(WARMUPS + SAMPLES):
            nothing, _ = self._products.run(lambda: None)
            now = {name: self._sample(name) for name in self._ends}
            if number >= WARMUPS:
                alone += nothing.all
                for name, found in now.items():
                    beside[name] += found
        return {
            name: median(found) / median(alone) - 1 if found and self._messages[name] is not None else None
            for name, found in beside.items()
        }

    def _sample(self, name: str) -> list[float]:
        """Milliseconds of the products beside the provider's messages; none if there are none."""
        while (messages := self._messages[name]) is not None:
            outgoing = self._bursts.fill(messages)
            begin = perf_counter()
            timeline, received = self._products.run(partial(self._ends[name].transfer, outgoing))
            seconds = perf_counter() - begin
            self._bursts.compare(name, outgoing, received)
            if received is None or len(timeline.beside) >= LEAST:
                answer = ENOUGH
            else:
                answer = MORE if seconds < PATIENCE else HOPELESS
            answers = self._world.exchange(answer)
            if set(answers) == {ENOUGH}:
                return [] if received is None else timeline.beside
            self._messages[name] = None if HOPELESS in answers else 2 * messages
        return []


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
