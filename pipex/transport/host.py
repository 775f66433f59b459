"""Ranks of one host: every edge is a ring in anonymous shared memory (csrc/host).

    launcher   run = HostRun.create(ranks)                its forked children inherit the object
    rank       world = run.join(rank)
    elsewhere  HostRun.open(run.address).join(rank)       where nothing can be inherited (torchrun)

The producer copies a tensor straight into a slot of the consumer's memory, and there the consumer uses it: one copy in
all. The slot is lent until the last reference to the tensor's storage is gone, so whatever autograd saves stays as it
was received.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipex import _native
from pipex.errors import InputError, PeerError, headline
from pipex.torch_internals import from_dlpack
from pipex.transport.header import Header, describe, mismatch
from pipex.transport.interface import (
    EdgeKind,
    EdgeSpec,
    Form,
    Links,
    Orders,
    Phase,
    Receiver,
    Sender,
    TensorForm,
    check_fits,
    check_number,
)
from pipex.transport.opening import exchange_offers
from pipex.transport.places import Places

TIMEOUT = 300.0
"""Seconds without any progress of the awaited rank after which it counts as stalled."""

MAX_TIMEOUT = 1e9

_DLPACK = {
    torch.float64: (2, 64), torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16),
    torch.int64: (0, 64), torch.int32: (0, 32), torch.int16: (0, 16), torch.int8: (0, 8), torch.uint8: (1, 8),
    torch.complex64: (5, 64), torch.complex128: (5, 128), torch.bool: (6, 8),
}  # fmt: skip
_AS_BYTES = (1, 8)
"""float8 crosses DLPack as uint8 and is viewed: older torch versions do not read its codes."""


class HostRun:
    """The control page of a run on one host: who is there, who does what, and how the run ended."""

    def __init__(self, control: _native.Control) -> None:
        self._control = control

    @classmethod
    def create(cls, ranks: int) -> HostRun:
        """Starts a run of ``ranks`` ranks.

        Raises:
            OutOfSharedMemory: there is no memory for it.
        """
        return cls(_native.Control(ranks))

    @classmethod
    def open(cls, address: bytes) -> HostRun:
        """Opens the run at the ``address`` of a process that holds it open.

        Raises:
            InputError: there is no run.
            ConfigMismatch: another version of pipex made it.
        """
        return cls(_native.Control.open(address))

    @property
    def ranks(self) -> int:
        return self._control.ranks

    @property
    def address(self) -> bytes:
        """32 bytes by which processes of this user and host can open the run, until ``close``."""
        return self._control.address

    def lost(self, rank: int, how: str) -> None:
        """Tells all ranks that ``rank`` has ended; for a launcher, which also sees children that never joined.

        ``how`` completes "rank 2 is gone: ", such as ``"killed by SIGKILL"``. The first failure of a run wins.
        """
        self._control.lost(rank, f"is gone: {how}")

    def join(self, rank: int, *, timeout: float = TIMEOUT) -> HostWorld:
        """Makes this process a rank of the run. ``timeout`` is in seconds.

        Raises:
            InputError: there is no such rank, or another process has taken it.
        """
        return HostWorld(self._control, self.member(rank, timeout))

    @property
    def control(self) -> _native.Control:
        return self._control

    def member(self, rank: int, timeout: float) -> _native.Member:
        """What ``join`` makes a world of; for other worlds over the same control page."""
        if not 0 < timeout <= MAX_TIMEOUT:
            raise InputError(
                "a time-out is out of range", got=timeout, needed=f"seconds above 0, at most {MAX_TIMEOUT:g}"
            )
        threads = self.ranks * torch.get_num_threads()
        return _native.Member(self._control, rank, timeout, threads <= len(os.sched_getaffinity(0)))

    def close(self) -> None:
        """Closes the descriptor. Ranks that have joined go on."""
        self._control.close_descriptor()


class HostWorld:
    """The ranks of one run on one host (``pipex.transport.interface.World``)."""

    def __init__(self, control: _native.Control, member: _native.Member) -> None:
        self._control = control
        self._member = member
        self._left = False
        self._told = False  # this rank has raised, or been told of, the run's failure
        self.rank = member.rank
        self.ranks = control.ranks
        self.device = torch.device("cpu")
        self._places = Places()

    def exchange(self, payload: bytes) -> list[bytes]:
        try:
            return self._member.exchange(payload)
        except _native.Aborted as ending:
            raise self.peer_error(ending) from None

    def at(self, step: int, position: int) -> None:
        self._member.at(step, position)

    def open(self, specs: Sequence[EdgeSpec], digest: bytes, orders: Orders = ()) -> Links:
        first_position = self._places.add(digest, orders)  # before any exchange: no rank comes to an action before all
        incoming = {
            str(spec): [_native.RingReceiver(self._member, spec.source_rank, *size) for size in ring_sizes(spec)]
            for spec in specs
            if spec.destination_rank == self.rank
        }
        addresses = {edge: [ring.address.hex() for ring in rings] for edge, rings in incoming.items()}
        offers = exchange_offers(self, specs, digest, addresses)
        links = HostLinks(first_position)
        for spec in specs:
            edge = (spec.source, spec.destination, spec.kind)
            if spec.destination_rank == self.rank:
                links.receivers[edge] = HostReceiver(self, spec, digest, [ring.receive for ring in incoming[str(spec)]])
            elif spec.source_rank == self.rank:
                offered = [bytes.fromhex(address) for address in offers[spec.destination_rank][str(spec)]]
                links.senders[edge] = HostSender(self, spec, digest, [
                    _native.RingSender(self._member, spec.destination_rank, address, *size).send
                    for address, size in zip(offered, ring_sizes(spec), strict=True)
                ])  # fmt: skip
        self.exchange(b"")  # every producer has opened its rings; from here on nobody else can
        for rings in incoming.values():
            for ring in rings:
                ring.close_descriptor()
        return links

    def fail(self, error: BaseException) -> None:
        self._told = True
        # Ctrl-C reaches every rank by itself; telling of it could only outrun the others' own.
        if not isinstance(error, (PeerError, KeyboardInterrupt)):
            self._member.fail(headline(error))

    def close(self) -> None:
        if self._left:
            return
        try:
            if not self._told:  # else the others have left, or will without us
                self.at(0, Phase.CLOSING)
                self.exchange(b"")
        finally:
            self._left = True
            self._member.leave()
            self._control.close_descriptor()

    def peer_error(self, ending: _native.Aborted) -> PeerError:
        """The error that all ranks raise for the run's abort record."""
        self._told = True
        kind, rank, step, position, text = ending.args
        return self._places.error(kind, text, rank, step, position)


class HostLinks:
    """This rank's ends of all edges (``pipex.transport.interface.Links``)."""

    def __init__(self, first_position: int) -> None:
        self.first_position = first_position
        self.senders: dict[tuple[int, int, EdgeKind], Sender] = {}
        self.receivers: dict[tuple[int, int, EdgeKind], Receiver] = {}

    def flush(self) -> None:
        """Nothing to wait for: ``send`` has copied."""

    def close(self) -> None:
        self.senders.clear()
        self.receivers.clear()


class HostSender:
    """The producer's end of an edge: one ring for each tensor of a message, given by its ``send``, which has copied
    when it returns."""

    def __init__(self, world: HostWorld, spec: EdgeSpec, digest: bytes, sends: Sequence[Callable[..., None]]) -> None:
        self._world, self._spec, self._digest = world, spec, digest
        self._sends = sends
        self._announced: dict[tuple[int, torch.Size, torch.dtype], tuple[_native.TensorTemplate, bool]] = {}

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        check_number(self._spec, tensors)
        try:
            for index, tensor in enumerate(tensors):
                announced = self._announced.get((index, tensor.shape, tensor.dtype))
                template, maybe_lazy = announced or self._announce(index, tensor)
                if not tensor.is_cpu:
                    raise InputError(f"the {self._spec} is in host memory",
                                     got=f"a tensor on {tensor.device}", needed="one on the CPU")  # fmt: skip
                if not tensor.is_contiguous() or (maybe_lazy and (tensor.is_neg() or tensor.is_conj())):
                    tensor = dense(tensor)
                self._sends[index](template, tensor.data_ptr(), step, microbatch)
        except _native.Aborted as ending:
            raise self._world.peer_error(ending) from None

    def _announce(self, index: int, tensor: Tensor) -> tuple[_native.TensorTemplate, bool]:
        # Torch may leave a conjugation or, seen through .imag, a negation to the reader. The latter has stride 2, so
        # it is contiguous only with one element; elsewhere the two checks (130 ns) are saved.
        maybe_lazy = tensor.is_complex() or tensor.numel() == 1
        form = TensorForm(tuple(tensor.shape), tensor.dtype)
        announced = _template(self._spec, self._digest, index, form), maybe_lazy
        self._announced[index, tensor.shape, tensor.dtype] = announced
        return announced


class HostReceiver:
    """The consumer's end of an edge, given by the ``receive`` of its rings."""

    def __init__(
        self, world: HostWorld, spec: EdgeSpec, digest: bytes, receives: Sequence[Callable[..., object]]
    ) -> None:
        self._world, self._spec, self._digest = world, spec, digest
        self._receives = receives
        self._form: Form | None = None
        self._announced: list[tuple[Callable[..., object], _native.TensorTemplate, torch.dtype | None]] = []

    def receive(self, step: int, microbatch: int, form: Form) -> tuple[Tensor, ...]:
        if form is not self._form:
            self._announce(form)
        tensors = []
        try:
            for receive, template, view in self._announced:
                tensor = from_dlpack(receive(template, step, microbatch))
                tensors.append(tensor if view is None else tensor.view(view))
        except _native.Aborted as ending:
            raise self._world.peer_error(ending) from None
        except _native.HeaderMismatch as error:
            raise mismatch(self._spec, *map(describe, error.args)) from None
        return tuple(tensors)

    def _announce(self, form: Form) -> None:
        """Prepares for messages of this form; almost all of a run have the same one."""
        check_fits(self._spec, form)
        self._announced = [
            (
                self._receives[index],
                _template(self._spec, self._digest, index, tensor),
                None if tensor.dtype in _DLPACK else tensor.dtype,
            )
            for index, tensor in enumerate(form)
        ]
        self._form = form


def dense(tensor: Tensor) -> Tensor:
    """The same values in row-major order, nothing left for the reader to do."""
    return tensor.resolve_neg().resolve_conj().contiguous()


def ring_sizes(spec: EdgeSpec) -> list[tuple[int, int, int]]:
    """For each tensor of a message: its bytes, messages under way, messages alive."""
    return [(tensor.nbytes, max(1, spec.slots), max(1, spec.alive)) for tensor in spec.form]


def _template(spec: EdgeSpec, digest: bytes, index: int, form: TensorForm) -> _native.TensorTemplate:
    header = Header(digest, spec.source, spec.destination, spec.kind, index, 0, 0, 0, form)
    return _native.TensorTemplate(header.pack(), form.shape, *_DLPACK.get(form.dtype, _AS_BYTES))
