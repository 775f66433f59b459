"""Half a round trip between two ranks of this host, by one of pipex's transports, beside torch and a plain copy.

    --transport host     shared memory                       beside gloo and memcpy
    --transport gloo     torch.distributed's Gloo, by way of pipex's ``group``       beside gloo itself and memcpy
    --transport device   the GPUs' memory, shared by the ranks, or one GPU's     beside gloo over host memory, and copy
    --transport nccl     NCCL, by way of ``group``, on a GPU for each rank           beside nccl itself and copy

    gloo, nccl   torch.distributed's isend and recv (both ways: batch_isend_irecv), into preallocated buffers
    memcpy       libc's copy inside one process; pipex's own goes past the caches for large messages, libc's does not
    copy         a copy within the memory of one GPU

A sample is a burst of round trips in a row: rank 0 sends, rank 1 sends an equal message back, and rank 0's time over
twice their number is the sample. With ``--bidirectional`` both send at the same time, and the time is over their
number. For a copy it is the time of one. GPUs have done all when the time is taken. All take turns. Messages come from
two buffers by turns, whose contents differ in every byte from each other and from those of the bursts before; the last
message that each rank received is compared byte by byte after the burst, outside the timed part. As is usual for such
figures nobody reads the messages meanwhile: the caches are theirs.

Sizes and columns are those of nccl-tests, as far as they say something here; time is in microseconds:

    p50_us, p20_us, p80_us, p99_us   of the samples; nccl-tests gives their mean
    algbw, busbw    GB/s (1e9 bytes): size over p50, one way also where both send. A message between two ranks crosses
                    the link once, so they are the same
    wrong           bytes that differ, of all messages compared, on both ranks
    ratio           the peer's p50 over this one's
    copy_share      bandwidth, both ways together where both send, over that of a copy
    send_us         what rank 0's host needs for a send; the median of the bursts' means
    sms             multiprocessors that the largest kernel of a transfer may take, on the rank where that is more: its
                    blocks, at most the GPU's multiprocessors. See ``kernels_seen`` for what is no kernel
    gemm_slowdown   by how much of its time a matrix product slows while bursts go on beside it without pause, on the
                    rank where that is more (``beside``). Messages beside it are compared, too

There are no elements but bytes, no reduction and no root, nothing is sent from where it is received to, and results are
always checked: so there are no columns count, type, redop, root and in-place, and no ``-c``. The last two figures are
the GPU's; they are None elsewhere, and where they could not be measured: ``sms`` where the profiler sees no kernels,
``gemm_slowdown`` of ranks that share a GPU without ``--virtual-devices``. Those get the GPU by turns, and one would see
only that. The profiler slows what comes after it, so it comes last, with bursts of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.distributed import FileStore, PrefixStore

from pipex.bench import gpu, torch_group
from pipex.bench.beside import Beside, Products
from pipex.bench.bursts import Bursts
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.environment import environment
from pipex.bench.kernels_seen import KernelWatch
from pipex.bench.options import add_common, floors_of, rounds_of
from pipex.bench.p2p_ends import Copies, End, RoundTrips, TorchExchange, TorchReceiver, TorchSender
from pipex.bench.report import Row, finish
from pipex.bench.sizes import format_size, parse_size, size_range
from pipex.bench.virtual_devices import shared_among
from pipex.errors import InputError, NativeUnavailable
from pipex.runtime.launch import launch
from pipex.runtime.worlds import current_world
from pipex.transport.group import GroupWorld
from pipex.transport.interface import EdgeSpec, Links, World

RANKS = 2
THREADS = 1  # per rank: a transport gets one core, and so does the memcpy it is compared with


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``pipex bench p2p``."""
    parser.description = (
        "Half a round trip between two ranks, by one of pipex's transports, by torch.distributed's Gloo or NCCL, and a "
        "plain copy in one process."
    )
    parser.add_argument("--transport", choices=("host", "device", "gloo", "nccl"), default="host",
                        help="host: shared memory; device: the GPUs'; gloo, nccl: pipex over torch.distributed's "
                        "backends; device and nccl need a GPU, nccl two (default: host)")  # fmt: skip
    parser.add_argument("--bidirectional", action="store_true", help="both ranks send at the same time")
    parser.add_argument("--virtual-devices", action="store_true",
                        help="ranks that share a GPU compute at once, with an equal share of it each")  # fmt: skip
    parser.add_argument("-b", "--minbytes", dest="b", metavar="SIZE", default="4K",
                        help="smallest message: bytes, or with K, M, G (default: 4K)")  # fmt: skip
    parser.add_argument("-e", "--maxbytes", dest="e", metavar="SIZE", default="64M", help="largest (default: 64M)")
    parser.add_argument("-f", "--stepfactor", dest="f", metavar="FACTOR", type=int,
                        help="from one size to the next (default: 4)")  # fmt: skip
    parser.add_argument("-i", "--stepbytes", dest="i", metavar="SIZE",
                        help="from one size to the next, in place of a factor")  # fmt: skip
    add_common(parser, samples=50, floor="how many times faster than torch pipex must be, such as 4K=20,256K=8")
    parser.add_argument("--min-copy-share", metavar="CASE=SHARE,...",
                        help="bandwidth over the copy's that pipex must reach, such as 4M=0.75")  # fmt: skip
    parser.add_argument("--max-us", dest="max_p50_us", metavar="CASE=US,...",
                        help="most microseconds that a message may take in the median, such as 64K=10")  # fmt: skip
    parser.add_argument("--max-send-us", metavar="CASE=US,...",
                        help="most microseconds that the host may need for a send, such as 64K=5")  # fmt: skip
    parser.add_argument("--max-sms", metavar="CASE=COUNT,...",
                        help="most multiprocessors that pipex's kernels may take, such as 64M=0")  # fmt: skip
    parser.add_argument("--max-gemm-slowdown", metavar="CASE=SHARE,...",
                        help="most by which messages may slow a matrix product, such as 64M=0.03; of ranks that share "
                        "a GPU it is measured with --virtual-devices only")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code."""
    rounds, sizes = rounds_of(options), _sizes(options)
    transport = TRANSPORTS[options.transport]
    floors = floors_of(options, transport.provider, [format_size(size) for size in sizes])
    on_gpu = transport.device == "cuda"
    if on_gpu:
        check_gpus(options.transport)
    with shared_among(RANKS) if options.virtual_devices else nullcontext():
        rows = measure(
            sizes, rounds, options.transport, both_ways=options.bidirectional, virtual_devices=options.virtual_devices
        )
    # Afterwards: CUDA must not start in this process before its ranks have.
    facts: dict[str, Any] = {"virtual_devices": options.virtual_devices} if on_gpu else {}
    facts |= gpu.describe_gpu(gpu.require_gpu("pipex bench p2p")) if on_gpu else {}
    return finish(environment(THREADS) | facts, rows, floors, as_json=options.json)


def _sizes(options: argparse.Namespace) -> list[int]:
    """
    Raises:
        InputError: two options exclude each other, or a size is none.
    """
    if options.f is not None and options.i is not None:
        raise InputError("two ways from one size to the next", got=f"-f {options.f} and -i {options.i}", needed="one")
    if options.virtual_devices and options.transport != "device":
        raise InputError("only ranks that share a GPU get shares of it", got=f"--transport {options.transport}",
                         needed="--transport device", fix="leave --virtual-devices out")  # fmt: skip
    step = 0 if options.i is None else parse_size(options.i)
    factor = options.f if options.f is not None else 1 if step else 4
    return size_range(parse_size(options.b), parse_size(options.e), factor, step)


def check_gpus(name: str) -> None:
    """Looks whether there are enough GPUs for the transport, without starting CUDA in this process.

    Raises:
        NativeUnavailable: there are too few.
    """
    gpu.check_gpu(f"pipex bench p2p --transport {name}")
    needed = RANKS if name == "nccl" else 1
    if torch.cuda.device_count() < needed:
        raise NativeUnavailable(
            "NCCL wants a GPU for each rank", got=torch.cuda.device_count(), needed=needed, fix="use --transport device"
        )


def measure(
    sizes: Sequence[int], rounds: Rounds, name: str = "host", *, both_ways: bool = False, virtual_devices: bool = False
) -> list[Row]:
    """Measures messages of each of ``sizes`` bytes by a transport; three rows per size.

    Args:
        both_ways: both ranks send at the same time.
        virtual_devices: ranks that share a GPU have been given shares of it, in which they compute at once.
    """
    transport = TRANSPORTS[name]
    job = (name, list(sizes), rounds.samples, rounds.warmups, both_ways, virtual_devices)
    ranks = launch(_rank, RANKS, args=job, device=transport.device)
    rows = []
    for index, nbytes in enumerate(sizes):
        found = [rank[index] for rank in ranks]
        times = {name: quantiles(samples) for name, samples in found[0]["samples"].items()}
        for name, time in times.items():
            ways = 2 if both_ways and name != transport.limit else 1
            sends, samples = found[0]["sends"][name], found[0]["samples"][name]
            wrong = sum(rank["wrong"][name] for rank in found)
            sms = [rank["sms"][name] for rank in found]
            slowdowns = [slowdown for rank in found if (slowdown := rank["slowdown"][name]) is not None]
            rows.append(
                Row(
                    format_size(nbytes), name, {"bytes": nbytes}, time, times[transport.peer].p50 / time.p50,
                    wrong == 0,
                    {"p99_us": _p99(samples),
                     "algbw": nbytes / time.p50 / 1e3, "busbw": nbytes / time.p50 / 1e3,
                     "wrong": wrong,
                     "copy_share": ways * times[transport.limit].p50 / time.p50,
                     "send_us": 1e6 * quantiles(sends).p50 if sends else None,
                     "sms": None if None in sms else max(sms),
                     "gemm_slowdown": max(slowdowns, default=None)},
                )
            )  # fmt: skip
    return rows


def _p99(samples: Sequence[float]) -> float:
    """The 99th percentile, by linear interpolation between samples."""
    return samples[0] if len(samples) == 1 else statistics.quantiles(samples, n=100, method="inclusive")[98]


Ends = Callable[[int], AbstractContextManager[dict[str, End]]]
"""Bytes of a message -> inside, by provider, this rank's part in sending them. Collective."""


def _rank(
    name: str, sizes: Sequence[int], samples: int, warmups: int, both_ways: bool, virtual_devices: bool
) -> list[dict[str, Any]]:
    """On each rank, for each size: its samples in µs and what else was found, by provider."""
    torch.set_num_threads(THREADS)
    world, transport = current_world(), TRANSPORTS[name]
    cores = sorted(os.sched_getaffinity(0))
    with torch_group.joined(world, transport.peer) as path, _edges(world, transport, path) as edges:
        # Each rank gets a core of its own: a scheduler that puts both on one turns microseconds into switches between
        # them. Only this thread is bound; Gloo's, which exist by now, stay free.
        os.sched_setaffinity(0, {cores[world.rank % len(cores)]})
        rounds, ends = Rounds(samples, warmups), partial(_ends, world, edges, transport, both_ways)
        on_gpu = transport.device == "cuda"
        at_once = on_gpu and (virtual_devices or torch.cuda.device_count() >= world.ranks)
        products = Products(world) if at_once else None
        found = [_measure_size(world, ends, nbytes, rounds, products) for nbytes in sizes]
        if on_gpu:
            for size, sms in zip(found, _multiprocessors(world, ends, sizes), strict=True):
                size["sms"] = sms
        return found


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


@contextmanager
def _ends(world: World, edges: World, transport: Transport, both_ways: bool, nbytes: int) -> Iterator[dict[str, End]]:
    links = _open(edges)
    me, peer, device = world.rank, 1 - world.rank, world.device
    staged = device.type == "cuda" and transport.peer == "gloo"
    trips = partial(RoundTrips, me, device, both_ways=both_ways)
    receiver = (TorchExchange if both_ways else TorchReceiver)(peer, nbytes, device, staged)
    sender = receiver if isinstance(receiver, TorchExchange) else TorchSender(peer, staged)
    yield {
        transport.provider: trips(links.senders[me, peer, "activation"], links.receivers[peer, me, "activation"]),
        transport.peer: trips(sender, receiver),
        transport.limit: Copies(me, device, nbytes),
    }
    links.close()


def _open(world: World) -> Links:
    """An edge each way."""
    specs = [EdgeSpec(source, 1 - source, "activation", source, 1 - source, slots=1, alive=1) for source in (0, 1)]
    return world.open(specs, digest=bytes(16))


def _measure_size(
    world: World, ends: Ends, nbytes: int, rounds: Rounds, products: Products | None
) -> dict[str, dict[str, Any]]:
    with ends(nbytes) as providers:
        bursts = Bursts(world, nbytes, providers)
        samples = rounds.interleave({name: partial(bursts.sample, name) for name in providers})
        sends = {name: list(end.send_seconds)[-rounds.samples :] for name, end in providers.items()}
        unknown: dict[str, float | None] = dict.fromkeys(providers)
        slowdown = unknown if products is None else Beside(world, products, bursts, providers).slowdowns()
        return {"samples": samples, "sends": sends, "wrong": bursts.wrong, "slowdown": slowdown, "sms": unknown}


def _multiprocessors(world: World, ends: Ends, sizes: Sequence[int]) -> list[dict[str, int | None]]:
    """For each size, by provider, how many multiprocessors this rank's kernels took in a burst."""
    watched: list[list[str]] = []
    with KernelWatch(world.device) as watch:
        for nbytes in sizes:
            with ends(nbytes) as providers:
                bursts = Bursts(world, nbytes, providers)
                for name, end in providers.items():
                    bursts.sample(name)  # what a first burst sets up is not the transfer's
                    outgoing = bursts.fill(bursts.messages)
                    bursts.meet()
                    watch.watch(partial(end.transfer, outgoing))
                watched.append(list(providers))
    counts = iter(watch.multiprocessors())
    return [{name: next(counts) for name in names} for names in watched]
