"""Ranks of one host with a GPU each (or sharing one): every edge is a ring in device memory (csrc/device).

    run = HostRun.create(ranks)
    world = join(run, rank, torch.device("cuda", rank))

The host part is that of ``pipex.transport.host``: the same control page, the same watch over peers. Tensors are copied
by the GPU's copy engine from where the producer computed them into a slot of the consumer's memory, where they are
used; streams wait for them, no host does. A message larger than all before it goes through host memory, and the
consumer makes larger slots; where it has no memory for them, such messages go on through the host's. Where the GPUs
cannot do any of that, all ranks go over host memory instead and say why.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipex import _native
from pipex.errors import NativeUnavailable, OutOfDeviceMemory
from pipex.transport.header import copied, describe, edge_header, mismatch
from pipex.transport.host import TIMEOUT, Forms, HostLinks, HostRun, HostWorld, Tables
from pipex.transport.interface import Buffers, EdgeSpec, Links, Orders, TensorForm
from pipex.transport.opening import exchange_offers
from pipex.transport.staged import CPU, StagedLinks, to

LIBRARY = "libcuda.so.1"
_DLPACK_DEVICE = {"cpu": 1, "cuda": 2}


def join(
    run: HostRun, rank: int, device: torch.device, *, timeout: float = TIMEOUT, library: str = LIBRARY
) -> DeviceWorld:
    """Makes this process a rank of the run, with its stages on ``device``.

    Args:
        device: a CUDA device; the CPU with a library that simulates a driver in host memory.
        timeout: seconds without any progress of an awaited rank after which it counts as stalled.
        library: the CUDA driver.

    Raises:
        InputError: there is no such rank, or another process has taken it.
        NativeUnavailable: there is no driver, or it finds no GPU.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    member = run.member(rank, timeout)
    device_rank = _native.DeviceRank(member, library, device.index or 0, _DLPACK_DEVICE[device.type])
    return DeviceWorld(run.control, member, device, device_rank)


class DeviceWorld(HostWorld):
    """The ranks of one run on one host, on GPUs (``pipex.transport.interface.World``).

    Attributes:
        staged: why the last opened edges go over host memory; None where they do not.
    """

    def __init__(
        self, control: _native.Control, member: _native.Member, device: torch.device, rank: _native.DeviceRank
    ) -> None:
        super().__init__(control, member)
        self.device = device
        self.staged: str | None = None
        self._device_rank = rank
        self._sources: deque[Sequence[Tensor]] = deque()  # messages sent, and maybe not copied yet
        self._copied = 0  # of all messages ever sent
        self._opened: list[DeviceLinks] = []
        self._missing: str | None = None  # not asked yet
        if member.rank == 0 and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
            warnings.warn(
                "CUDA_DEVICE_MAX_CONNECTIONS is 1: streams share one hardware queue, so that transfers and computation "
                "hardly overlap; leave it unset", RuntimeWarning, stacklevel=2,
            )  # fmt: skip

    def open(self, specs: Sequence[EdgeSpec], digest: bytes, orders: Orders = ()) -> Links:
        """Opens all edges (see the interface); also raises CudaError, where a call of the driver failed."""
        first_position = self._places.add(digest, orders)
        self.exchange(b"")  # all have closed what was open before
        self._device_rank.free_retired()
        links = DeviceLinks(self, first_position)
        problem = self._try_to_open(links, specs, digest)
        if problem is None:
            self.staged = None
            self._opened.append(links)
            return links
        links.close()
        if self.rank == 0 and problem != self.staged:
            warnings.warn(
                f"tensors between ranks go over host memory, which is slower: {problem}", RuntimeWarning, stacklevel=2
            )
        self.staged = problem
        staged = StagedLinks(super().open(specs, digest, orders), self.device)
        self._device_rank.free_retired()
        return staged

    def _try_to_open(self, links: DeviceLinks, specs: Sequence[EdgeSpec], digest: bytes) -> str | None:
        """Says what is in the way, the same on every rank."""
        if self._missing is None:
            self._missing = self._device_rank.missing()
        problem, offer = self._missing, {}
        if not problem:
            try:
                offer = links.make(specs, digest)
            except NativeUnavailable as error:
                problem = str(error)
        offers = exchange_offers(self, specs, digest, [problem, offer])
        for rank, (missing, _) in enumerate(offers):
            if missing:
                return f"rank {rank}: {missing}"
        try:
            links.connect(specs, [offered for _, offered in offers])
        except NativeUnavailable as error:
            problem = str(error)
        said = self.exchange(problem.encode())  # every ring is opened at both ends; from here on nobody else can
        links.close_descriptors()
        return next((theirs.decode() for theirs in said if theirs), None)

    def close(self) -> None:
        for links in self._opened:
            links.close()
        try:
            super().close()
        finally:
            if not self._told:
                self._device_rank.free_retired()
            self._device_rank.close()

    @property
    def stream(self) -> int:
        """The stream on which this thread computes now."""
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Keeps a message's tensors until they have been copied; lets go of those that have."""
        self._sources.append(tensors)
        sent = self._device_rank.sent
        while self._copied < sent:
            self._sources.popleft()
            self._copied += 1

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        try:
            self._device_rank.flush()
        except _native.Aborted as ending:
            raise self.peer_error(ending) from None
        self._copied += len(self._sources)
        self._sources.clear()


class DeviceLinks(HostLinks):
    """This rank's ends of all edges (``pipex.transport.interface.Links``)."""

    def __init__(self, world: DeviceWorld, first_position: int) -> None:
        super().__init__(first_position)
        self._world = world
        self._incoming: dict[str, _native.DeviceRingReceiver] = {}
        self._outgoing: dict[str, _native.DeviceRingSender] = {}

    def make(self, specs: Sequence[EdgeSpec], digest: bytes) -> dict[str, list[str]]:
        """Allocates this rank's memory and says how peers find it."""
        world, rank = self._world, self._world._device_rank
        for spec in specs:
            sizes = spec.slots, spec.alive, edge_header(spec, digest)
            if spec.destination_rank == world.rank:
                self._incoming[str(spec)] = _native.DeviceRingReceiver(rank, spec.source_rank, *sizes)
            elif spec.source_rank == world.rank:
                self._outgoing[str(spec)] = _native.DeviceRingSender(rank, spec.destination_rank, *sizes)
        offers = {edge: [ring.address.hex(), ring.offer.hex()] for edge, ring in self._incoming.items()}
        return offers | {edge: [ring.offer.hex()] for edge, ring in self._outgoing.items()}

    def connect(self, specs: Sequence[EdgeSpec], offers: Sequence[Any]) -> None:
        """Maps the peers' memory."""
        world = self._world
        for spec in specs:
            edge = (spec.source, spec.destination, spec.kind)
            if spec.destination_rank == world.rank:
                incoming = self._incoming[str(spec)]
                (released,) = offers[spec.source_rank][str(spec)]
                incoming.connect(bytes.fromhex(released))
                self.receivers[edge] = DeviceReceiver(world, spec, incoming)
            elif spec.source_rank == world.rank:
                outgoing = self._outgoing[str(spec)]
                address, written = offers[spec.destination_rank][str(spec)]
                outgoing.connect(bytes.fromhex(address), bytes.fromhex(written))
                self.rings.append(outgoing)
                self.senders[edge] = DeviceSender(world, spec, outgoing)

    def close_descriptors(self) -> None:
        for ring in self._incoming.values():
            ring.close_descriptor()

    def flush(self) -> None:
        super().flush()
        self._world.flush()

    def close(self) -> None:
        super().close()
        for receiver in self._incoming.values():
            receiver.close()
        for sender in self._outgoing.values():
            sender.close()
        self._incoming.clear()
        self._outgoing.clear()


class DeviceSender:
    """The producer's end of an edge. ``send`` enqueues; the tensors are kept until they have been copied."""

    def __init__(self, world: DeviceWorld, spec: EdgeSpec, ring: _native.DeviceRingSender) -> None:
        self._world, self._spec, self._ring = world, spec, ring
        self._forms = Forms(spec, world.device)

    @property
    def buffers(self) -> Buffers:
        return Buffers(self._ring.nbytes, self._ring.grown)

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        world, ring, stream = self._world, self._ring, self._world.stream
        form, sent, _ = self._forms.of(tensors)
        try:
            if ring.fits(form, stream):
                if self._spec.kind == "activation":
                    sent = [s if t.requires_grad else copied(s) for s, t in zip(sent, tensors, strict=True)]
                ring.send(form, [tensor.data_ptr() for tensor in sent], stream, step, microbatch)
                world.keep(sent)
            else:
                copies = [to(tensor, CPU) for tensor in sent]
                ring.send_from_host(form, [copy.data_ptr() for copy in copies], step, microbatch)
        except _native.Aborted as ending:
            raise world.peer_error(ending) from None


class DeviceReceiver:
    """The consumer's end of an edge."""

    def __init__(self, world: DeviceWorld, spec: EdgeSpec, ring: _native.DeviceRingReceiver) -> None:
        self._world, self._spec, self._ring = world, spec, ring
        self._tables = Tables()

    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]:
        world, tables, stream = self._world, self._tables, self._world.stream
        try:
            seen, capsules = self._take(stream, step, microbatch)
            if seen is not None:
                tables.learn(seen)
            if capsules is None:  # more are kept than the plan says: this message gets memory of its own
                found = [strided(tensor, world.device) for tensor in tables.form]
                self._ring.receive_into([tensor.data_ptr() for tensor in found], stream, step, microbatch)
                return tuple(t.requires_grad_(f.wants_gradient) for t, f in zip(found, tables.form, strict=True))
        except _native.Aborted as ending:
            raise world.peer_error(ending) from None
        except _native.HeaderMismatch as error:
            raise mismatch(self._spec, *map(describe, error.args)) from None
        received = tables.tensors(capsules)
        return tuple(
            t if t.device == world.device else to(t, world.device).requires_grad_(t.requires_grad) for t in received
        )

    def _take(
        self, stream: int, step: int, microbatch: int
    ) -> tuple[tuple[bytes, int] | None, tuple[object, ...] | None]:
        """The next message, also where there is no device memory for larger slots: it lies whole in the host's."""
        try:
            return self._ring.receive(stream, step, microbatch)
        except OutOfDeviceMemory:
            torch.cuda.empty_cache()  # torch keeps what it has freed
        try:
            return self._ring.receive(stream, step, microbatch)
        except OutOfDeviceMemory as error:
            warnings.warn(
                f"messages of this size go over host memory on the {self._spec}, which is slower: {error}",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        return self._ring.receive(stream, step, microbatch, may_grow=False)


def strided(form: TensorForm, device: torch.device) -> Tensor:
    """A tensor of a form, in new memory."""
    memory = torch.empty(form.nbytes, dtype=torch.uint8, device=device).view(form.dtype)
    return memory.as_strided(form.shape, form.strides)
