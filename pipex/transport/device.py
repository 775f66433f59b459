"""Ranks of one host with a GPU each (or sharing one): every edge is a ring in device memory (csrc/device).

    run = HostRun.create(ranks)
    world = join(run, rank, torch.device("cuda", rank))

The host part is that of ``pipex.transport.host``: the same control page, the same watch over peers. A tensor is copied
by the GPU's copy engine from where the producer computed it into a slot of the consumer's memory, where it is used;
streams wait for it, no host does. Where the GPUs cannot do that, all ranks go over host memory instead and say why.
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
from pipex.errors import InputError, NativeUnavailable
from pipex.torch_internals import from_dlpack
from pipex.transport.header import describe, mismatch
from pipex.transport.host import TIMEOUT, HostLinks, HostReceiver, HostRun, HostSender, HostWorld, dense, ring_sizes
from pipex.transport.interface import EdgeSpec, Form, Links, Orders, check_number
from pipex.transport.opening import exchange_offers
from pipex.transport.staged import StagedLinks

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
        self._sources: deque[Tensor] = deque()  # sent, and maybe not copied yet
        self._copied = 0  # of all tensors ever sent
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
                offer = links.make(specs)
            except NativeUnavailable as error:
                problem = str(error)
        offers = exchange_offers(self, specs, digest, [problem, offer])
        for rank, (missing, _) in enumerate(offers):
            if missing:
                return f"rank {rank}: {missing}"
        try:
            links.connect(specs, digest, [offered for _, offered in offers])
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

    def keep(self, tensor: Tensor) -> None:
        """Keeps a tensor that was sent until it has been copied; lets go of those that have."""
        self._sources.append(tensor)
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
        self._incoming: dict[str, list[_native.DeviceRingReceiver]] = {}
        self._outgoing: dict[str, list[_native.DeviceRingSender]] = {}

    def make(self, specs: Sequence[EdgeSpec]) -> dict[str, list[list[str]]]:
        """Allocates this rank's memory and says how peers find it."""
        world, rank = self._world, self._world._device_rank
        for spec in specs:
            if spec.destination_rank == world.rank:
                self._incoming[str(spec)] = rings = []
                for size in ring_sizes(spec):
                    rings.append(_native.DeviceRingReceiver(rank, spec.source_rank, *size))
            elif spec.source_rank == world.rank:
                self._outgoing[str(spec)] = [
                    _native.DeviceRingSender(rank, spec.destination_rank, *size) for size in ring_sizes(spec)
                ]
        offers = {e: [[ring.address.hex(), ring.offer.hex()] for ring in rings] for e, rings in self._incoming.items()}
        return offers | {e: [[ring.offer.hex()] for ring in rings] for e, rings in self._outgoing.items()}

    def connect(self, specs: Sequence[EdgeSpec], digest: bytes, offers: Sequence[Any]) -> None:
        """Maps the peers' memory."""
        world = self._world
        for spec in specs:
            edge = (spec.source, spec.destination, spec.kind)
            if spec.destination_rank == world.rank:
                incoming = self._incoming[str(spec)]
                for receiver, (released,) in zip(incoming, offers[spec.source_rank][str(spec)], strict=True):
                    receiver.connect(bytes.fromhex(released))
                self.receivers[edge] = DeviceReceiver(world, spec, digest, incoming)
            elif spec.source_rank == world.rank:
                outgoing = self._outgoing[str(spec)]
                for sender, (address, slots) in zip(outgoing, offers[spec.destination_rank][str(spec)], strict=True):
                    sender.connect(bytes.fromhex(address), bytes.fromhex(slots))
                self.senders[edge] = DeviceSender(world, spec, digest, outgoing)

    def close_descriptors(self) -> None:
        for rings in self._incoming.values():
            for ring in rings:
                ring.close_descriptor()

    def flush(self) -> None:
        self._world.flush()

    def close(self) -> None:
        super().close()
        for receivers in self._incoming.values():
            for receiver in receivers:
                receiver.close()
        for senders in self._outgoing.values():
            for sender in senders:
                sender.close()
        self._incoming.clear()
        self._outgoing.clear()


class DeviceSender(HostSender):
    """The producer's end of an edge. ``send`` enqueues; the tensors are kept until they have been copied."""

    def __init__(
        self, world: DeviceWorld, spec: EdgeSpec, digest: bytes, rings: Sequence[_native.DeviceRingSender]
    ) -> None:
        super().__init__(world, spec, digest, [ring.send for ring in rings])
        self._world: DeviceWorld = world

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        check_number(self._spec, tensors)
        device, stream = self._world.device, self._world.stream
        try:
            for index, tensor in enumerate(tensors):
                if tensor.device != device:
                    raise InputError(f"the {self._spec} is on {device}",
                                     got=f"a tensor on {tensor.device}", needed=f"one on {device}")  # fmt: skip
                announced = self._announced.get((index, tensor.shape, tensor.dtype))
                template, _ = announced or self._announce(index, tensor)
                source = dense(tensor)
                self._sends[index](template, source.data_ptr(), stream, step, microbatch)
                self._world.keep(source)
        except _native.Aborted as ending:
            raise self._world.peer_error(ending) from None


class DeviceReceiver(HostReceiver):
    """The consumer's end of an edge."""

    def __init__(
        self, world: DeviceWorld, spec: EdgeSpec, digest: bytes, rings: Sequence[_native.DeviceRingReceiver]
    ) -> None:
        super().__init__(world, spec, digest, [ring.receive for ring in rings])
        self._world: DeviceWorld = world
        self._rings = rings

    def receive(self, step: int, microbatch: int, form: Form) -> tuple[Tensor, ...]:
        if form is not self._form:
            self._announce(form)
        stream = self._world.stream
        tensors = []
        try:
            for ring, announced, (_, template, view) in zip(self._rings, form, self._announced, strict=True):
                capsule = ring.receive(template, stream, step, microbatch)
                if capsule is None:  # more are kept than the plan says: this one gets memory of its own
                    tensor = torch.empty(announced.shape, dtype=announced.dtype, device=self._world.device)
                    ring.receive_into(template, tensor.data_ptr(), stream, step, microbatch)
                else:
                    tensor = from_dlpack(capsule)
                    tensor = tensor if view is None else tensor.view(view)
                tensors.append(tensor)
        except _native.Aborted as ending:
            raise self._world.peer_error(ending) from None
        except _native.HeaderMismatch as error:
            raise mismatch(self._spec, *map(describe, error.args)) from None
        return tuple(tensors)
