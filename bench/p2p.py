"""Half a round trip between two ranks of this host, by one of pipex's transports, beside torch and a plain copy.

    --transport host     shared memory                       beside gloo and memcpy
    --transport gloo     torch.distributed's Gloo, by way of pipex's ``group``       beside gloo itself and memcpy
    --transport device   the GPUs' memory, shared by the ranks, or one GPU's     beside gloo over host memory, and copy
    --transport nccl     NCCL, by way of ``group``, on a GPU for each rank           beside nccl itself and copy

    gloo, nccl   torch.distributed's isend and recv, into preallocated buffers
    memcpy       libc's copy inside one process; pipex's own goes past the caches for large messages, libc's does not
    copy         a copy within the memory of one GPU

A sample is a burst of round trips in a row: rank 0 sends, rank 1 sends an equal message back, and rank 0's time over
twice their number is the sample. With ``--bidirectional`` both send at the same time, the time is over their number,
and ``gb_per_s`` counts both. For a copy it is the time of one. GPUs have done all when the time is taken. All take
turns. Messages come from two buffers by turns, whose contents differ in every byte from each other and from those of
the bursts before; the last message that each rank received is compared byte by byte after the burst, outside the timed
part. As is usual for such figures nobody reads the messages meanwhile: the caches are theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import FileStore, PrefixStore

from pipex.bench import torch_group
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.gpu import require_gpu
from pipex.bench.p2p_ends import Copies, RoundTrips, Run, TorchReceiver, TorchSender, synchronize
from pipex.bench.report import Row
from pipex.bench.sizes import format_size
from pipex.errors import NativeUnavailable
from pipex.runtime.launch import launch
from pipex.runtime.worlds import current_world
from pipex.transport.group import GroupWorld
from pipex.transport.interface import EdgeSpec, Form, Links, TensorForm, World

THREADS = 1  # per rank: a transport gets one core, and so does the memcpy it is compared with

BURST_BYTES = 16 << 20  # of messages each way; a clock cannot see a small one alone
MAX_BURST = 64


@dataclass(frozen=True)
class Transport:
    """What is measured: pipex's provider, torch's, and the copy that limits both."""

    device: str
    provider: str
    peer: Literal["gloo", "nccl"]
    limit: str
    group: bool = False
    """whether pipex goes through torch.distributed's backend too"""


TRANSPORTS = {
    "host": Transport("cpu", "host", "gloo", "memcpy"),
    "gloo": Transport("cpu", "group", "gloo", "memcpy", group=True),
    "device": Transport("cuda", "device", "gloo", "copy"),
    "nccl": Transport("cuda", "group", "nccl", "copy", group=True),
}


def require_gpus(name: str) -> torch.device:
    """The first GPU.

    Raises:
        NativeUnavailable: there are too few for the transport.
    """
    device = require_gpu(f"pipex bench p2p --transport {name}")
    needed = 2 if name == "nccl" else 1
    if torch.cuda.device_count() < needed:
        raise NativeUnavailable(
            "NCCL wants a GPU for each rank", got=torch.cuda.device_count(), needed=needed, fix="use --transport device"
        )
    return device


def measure(sizes: Sequence[int], rounds: Rounds, name: str = "host", *, both_ways: bool = False) -> list[Row]:
    """Measures messages of each of ``sizes`` bytes by a transport; three rows per size.

    A row's figures are ``gb_per_s`` (1e9 bytes), ``copy_share``, its bandwidth over that of a copy, ``p99_us``, and
    ``send_us``, what the host needs for a send.
    """
    transport = TRANSPORTS[name]
    job = (name, list(sizes), rounds.samples, rounds.warmups, both_ways)
    ranks = launch(_rank, 2, args=job, device=transport.device)
    rows = []
    for index, nbytes in enumerate(sizes):
        found = ranks[0][index]
        times = {name: quantiles(samples) for name, samples in found["samples"].items()}
        for name, time in times.items():
            ways = 2 if both_ways and name != transport.limit else 1
            sends = found["sends"][name]
            rows.append(
                Row(
                    format_size(nbytes), name, {"bytes": nbytes}, time, times[transport.peer].p50 / time.p50,
                    all(rank[index]["correct"][name] for rank in ranks),
                    {"gb_per_s": ways * nbytes / time.p50 / 1e3,
                     "copy_share": ways * times[transport.limit].p50 / time.p50,
                     "p99_us": _p99(found["samples"][name]),
                     "send_us": 1e6 * quantiles(sends).p50 if sends else None},
                )
            )  # fmt: skip
    return rows


def _p99(samples: Sequence[float]) -> float:
    """The 99th percentile, by linear interpolation between samples."""
    place = 0.99 * (len(samples) - 1)
    ordered = sorted(samples)
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(samples) - 1)]
    return low + (high - low) * (place % 1)


def _rank(name: str, sizes: Sequence[int], samples: int, warmups: int, both_ways: bool) -> list[dict[str, Any]]:
    """On each rank, for each size: its samples in µs and whether all it received was right, by provider."""
    torch.set_num_threads(THREADS)
    world, transport = current_world(), TRANSPORTS[name]
    cores = sorted(os.sched_getaffinity(0))
    with torch_group.joined(world, transport.peer) as path, _edges(world, transport, path) as edges:
        # Each rank gets a core of its own: a scheduler that puts both on one turns microseconds into switches between
        # them. Only this thread is bound; Gloo's, which exist by now, stay free.
        os.sched_setaffinity(0, {cores[world.rank % len(cores)]})
        rounds = Rounds(samples, warmups)
        return [_measure_size(world, edges, transport, nbytes, rounds, both_ways) for nbytes in sizes]


@contextmanager
def _edges(world: World, transport: Transport, store: str) -> Iterator[World]:
    """The world whose edges are measured; ``store`` is the file by which ranks find each other."""
    if not transport.group:
        yield world
        return
    found = PrefixStore("pipex-bench", FileStore(store, world.ranks))
    group = GroupWorld(found, world.rank, world.ranks, backend=transport.peer, device=world.device)
    try:
        yield group
    finally:
        group.close()


def _measure_size(
    world: World, edges: World, transport: Transport, nbytes: int, rounds: Rounds, both_ways: bool
) -> dict[str, Any]:
    messages = max(2, min(MAX_BURST, BURST_BYTES // nbytes))
    form = (TensorForm((nbytes,), torch.uint8),)
    links = _open(edges, form)
    me, peer, device = world.rank, 1 - world.rank, world.device
    staged = device.type == "cuda" and transport.peer == "gloo"
    trips = partial(RoundTrips, me, device, form=form, both_ways=both_ways)
    ends: dict[str, RoundTrips | Copies] = {
        transport.provider: trips(links.senders[me, peer, "activation"], links.receivers[peer, me, "activation"]),
        transport.peer: trips(TorchSender(peer, staged), TorchReceiver(peer, nbytes, device, staged)),
        transport.limit: Copies(me, device, nbytes),
    }
    bursts = _Bursts(world, nbytes, messages, {name: end.run for name, end in ends.items()})
    times = rounds.interleave({name: partial(bursts.sample, name) for name in ends})
    links.close()
    sends = {name: list(end.send_seconds) for name, end in ends.items()}
    return {"samples": times, "correct": bursts.correct, "sends": sends}


def _open(world: World, form: Form) -> Links:
    """An edge each way."""
    specs = [
        EdgeSpec(source, 1 - source, "activation", source, 1 - source, slots=1, alive=1, form=form) for source in (0, 1)
    ]
    return world.open(specs, digest=bytes(16))


class _Bursts:
    """Fills, runs, times and compares the bursts of all providers."""

    def __init__(self, world: World, nbytes: int, messages: int, runs: Mapping[str, Run]) -> None:
        self._world = world
        self._runs = runs
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=world.device) for _ in range(2)]
        self._outgoing = [self._buffers[number % 2] for number in range(messages)]
        noise = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))
        self._noise = noise.to(world.device)
        self._next = 0
        self.correct = dict.fromkeys(runs, True)

    def sample(self, provider: str) -> float:
        """Microseconds per message of one burst; of no meaning on rank 1."""
        for buffer in self._buffers:
            fill(buffer, self._noise, self._next)
            self._next += 1
        synchronize(self._world.device)
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
