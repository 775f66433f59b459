"""Half a round trip between two processes of this host.

    host     pipex's shared memory, through the interface and the receive pool that the runtime uses
    gloo     torch.distributed.send and recv on the loopback interface, into preallocated buffers
    memcpy   libc's copy inside one process; pipex's own goes past the caches for large messages, which libc's does not

A sample is a burst of round trips in a row: rank 0 sends, rank 1 sends an equal message back, and rank 0's time over
twice their number is the sample. For memcpy it is the time of a copy. The three take turns. Messages come from two
buffers by turns, whose contents differ in every byte from each other and from those of the bursts before; the last
message that each rank received is compared byte by byte after the burst, outside the timed part. As is usual for such
figures nobody reads the messages meanwhile: the caches are theirs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipex.bench import gloo
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.report import Row
from pipex.bench.sizes import format_size
from pipex.runtime.launch import launch
from pipex.runtime.worlds import current_world
from pipex.transport.interface import EdgeSpec, Form, Links, Receiver, Sender, TensorForm, World

PROVIDER, PEER, LIMIT = "host", "gloo", "memcpy"
THREADS = 1  # per rank: a transport gets one core, and so does the memcpy it is compared with

BURST_BYTES = 16 << 20  # of messages each way; a clock cannot see a small one alone
MAX_BURST = 64


def measure(sizes: Sequence[int], rounds: Rounds) -> list[Row]:
    """Measures messages of each of ``sizes`` bytes; three rows per size.

    A row's figures are ``gb_per_s`` (1e9 bytes, one direction) and ``memcpy_share``, its bandwidth over memcpy's.
    """
    ranks = launch(_rank, 2, args=(list(sizes), rounds.samples, rounds.warmups))
    rows = []
    for index, nbytes in enumerate(sizes):
        times = {name: quantiles(samples) for name, samples in ranks[0][index]["samples"].items()}
        for name, time in times.items():
            rows.append(
                Row(
                    format_size(nbytes), name, {"bytes": nbytes}, time, times[PEER].p50 / time.p50,
                    all(rank[index]["correct"][name] for rank in ranks),
                    {"gb_per_s": nbytes / time.p50 / 1e3, "memcpy_share": times[LIMIT].p50 / time.p50},
                )
            )  # fmt: skip
    return rows


def _rank(sizes: Sequence[int], samples: int, warmups: int) -> list[dict[str, Any]]:
    """On each rank, for each size: its samples in µs and whether all it received was right, by provider."""
    torch.set_num_threads(THREADS)
    world = current_world()
    cores = sorted(os.sched_getaffinity(0))
    with gloo.joined(world):
        # Each rank gets a core of its own: a scheduler that puts both on one turns microseconds into switches between
        # them. Only this thread is bound; Gloo's, which exist by now, stay free.
        os.sched_setaffinity(0, {cores[world.rank % len(cores)]})
        return [_measure_size(world, nbytes, Rounds(samples, warmups)) for nbytes in sizes]


def _measure_size(world: World, nbytes: int, rounds: Rounds) -> dict[str, Any]:
    messages = max(2, min(MAX_BURST, BURST_BYTES // nbytes))
    form = (TensorForm((nbytes,), torch.uint8),)
    links = _open(world, form)
    me, peer = world.rank, 1 - world.rank
    ends: dict[str, _RoundTrips | _Copies] = {
        PROVIDER: _RoundTrips(
            me, links.senders[me, peer, "activation"], links.receivers[peer, me, "activation"], form
        ),
        PEER: _RoundTrips(me, GlooSender(peer), GlooReceiver(peer, nbytes), form),
        LIMIT: _Copies(me, nbytes),
    }  # fmt: skip
    bursts = _Bursts(world, nbytes, messages, {name: end.run for name, end in ends.items()})
    times = rounds.interleave({name: partial(bursts.sample, name) for name in ends})
    links.close()
    return {"samples": times, "correct": bursts.correct}


def _open(world: World, form: Form) -> Links:
    """An edge each way."""
    specs = [
        EdgeSpec(source, 1 - source, "activation", source, 1 - source, slots=1, alive=1, form=form) for source in (0, 1)
    ]
    return world.open(specs, digest=bytes(16))


_Run = Callable[[Sequence[Tensor]], tuple[float, Tensor | None]]
"""The messages of a burst -> seconds per message, and the last one that this rank received."""


class _Bursts:
    """Fills, runs, times and compares the bursts of all providers."""

    def __init__(self, world: World, nbytes: int, messages: int, runs: Mapping[str, _Run]) -> None:
        self._world = world
        self._runs = runs
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(2)]
        self._outgoing = [self._buffers[number % 2] for number in range(messages)]
        self._noise = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))
        self._next = 0
        self.correct = dict.fromkeys(runs, True)

    def sample(self, provider: str) -> float:
        """Microseconds per message of one burst; of no meaning on rank 1."""
        for buffer in self._buffers:
            fill(buffer, self._noise, self._next)
            self._next += 1
        self._world.exchange(b"")  # nobody fills or compares while the other one is timed
        self._world.exchange(b"")  # the first may have found this rank asleep; now both begin within a microsecond
        seconds, received = self._runs[provider](self._outgoing)
        self._world.exchange(b"")
        if received is not None:
            self.correct[provider] &= torch.equal(received, self._outgoing[-1])
        return seconds * 1e6


def fill(buffer: Tensor, noise: Tensor, number: int) -> None:
    """Content ``number``: no byte of it is the same in the 255 contents before and after."""
    torch.bitwise_xor(noise, number % 256, out=buffer)


@dataclass(frozen=True, slots=True)
class _RoundTrips:
    """Messages to the other rank and back."""

    rank: int
    sender: Sender
    receiver: Receiver
    form: Form

    def run(self, outgoing: Sequence[Tensor]) -> tuple[float, Tensor | None]:
        send, post, receive, form = self.sender.send, self.receiver.post, self.receiver.receive, self.form
        received: tuple[Tensor, ...] = ()
        begin = perf_counter()
        for number, tensor in enumerate(outgoing):
            received = ()  # its memory may be used again: Gloo has one buffer to receive into, too
            post(1, number)
            if self.rank == 0:
                send(1, number, (tensor,))
                received = receive(1, number, form)
            else:
                received = receive(1, number, form)
                send(1, number, (tensor,))
        return (perf_counter() - begin) / (2 * len(outgoing)), received[0]


class _Copies:
    """Copies on rank 0 while rank 1 waits."""

    def __init__(self, rank: int, nbytes: int) -> None:
        self._target = torch.empty(nbytes, dtype=torch.uint8) if rank == 0 else None

    def run(self, outgoing: Sequence[Tensor]) -> tuple[float, Tensor | None]:
        if self._target is None:
            return 0.0, None
        begin = perf_counter()
        for source in outgoing:
            ctypes.memmove(self._target.data_ptr(), source.data_ptr(), source.nbytes)
        return (perf_counter() - begin) / len(outgoing), self._target


class GlooSender:
    """The producer's end of an edge over torch.distributed."""

    def __init__(self, peer: int) -> None:
        self._peer = peer

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        dist.send(tensors[0], self._peer)


class GlooReceiver:
    """The consumer's end."""

    def __init__(self, peer: int, nbytes: int) -> None:
        self._peer = peer
        self._buffer = torch.empty(nbytes, dtype=torch.uint8)

    def post(self, step: int, microbatch: int) -> None:
        """Gloo's receive waits by itself."""

    def receive(self, step: int, microbatch: int, form: Form) -> tuple[Tensor, ...]:
        dist.recv(self._buffer, self._peer)
        return (self._buffer,)
