"""Ranks of one host: every edge is a ring in anonymous shared memory (csrc/host).

    launcher   run = HostRun.create(ranks)                its forked children inherit the object
    rank       world = run.join(rank)
    elsewhere  HostRun.open(run.address).join(rank)       where nothing can be inherited (torchrun)

The producer copies a message's tensors straight into memory that the consumer maps, and there the consumer uses them:
one copy in all. The slot is lent until the last reference to the tensors' storages is gone, so whatever autograd saves
stays as it was received.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipex import _native
from pipex.errors import InputError, MessageMismatch, PeerError, headline
from pipex.torch_internals import from_dlpack
from pipex.transport.header import (
    AS_BYTES,
    as_sent,
    check_memory,
    describe,
    edge_header,
    is_spread,
    mismatch,
    pack_table,
    read_table,
)
from pipex.transport.interface import (
    Buffers,
    EdgeKind,
    EdgeSpec,
    Form,
    Links,
    Orders,
    Phase,
    Receiver,
    Sender,
    form_of,
)
from pipex.transport.opening import exchange_offers
from pipex.transport.places import Places

_MEMORY = torch.device("cpu")  # also where the stages are on a GPU (pipex.transport.staged)

TIMEOUT = 300.0
"""Seconds without any progress of the awaited rank after which it counts as stalled."""

MAX_TIMEOUT = 1e9
MOST_RANKS = 4096
"""that a control page has places for (csrc/host/control.cpp)"""


def check_timeout(timeout: object) -> None:
    """Raises InputError for what is no time-out in seconds."""
    if not isinstance(timeout, (int, float)) or not 0 < timeout <= MAX_TIMEOUT:
        needed = f"seconds above 0, at most {MAX_TIMEOUT:g}"
        raise InputError("a time-out is out of range", got=repr(timeout), needed=needed)


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
        check_timeout(timeout)
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
            str(spec): _native.RingReceiver(
                self._member, spec.source_rank, spec.slots, spec.alive, edge_header(spec, digest)
            )
            for spec in specs
            if spec.destination_rank == self.rank
        }
        offers = exchange_offers(self, specs, digest, {edge: ring.address.hex() for edge, ring in incoming.items()})
        links = HostLinks(first_position)
        for spec in specs:
            edge = (spec.source, spec.destination, spec.kind)
            if spec.destination_rank == self.rank:
                links.receivers[edge] = HostReceiver(self, spec, incoming[str(spec)])
            elif spec.source_rank == self.rank:
                address = bytes.fromhex(offers[spec.destination_rank][str(spec)])
                ring = _native.RingSender(
                    self._member, spec.destination_rank, address, spec.slots, spec.alive, edge_header(spec, digest)
                )
                links.rings.append(ring)
                links.senders[edge] = HostSender(self, spec, ring)
        self.exchange(b"")  # every producer has opened its rings; from here on nobody else can
        for opened in incoming.values():
            opened.close_descriptor()
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
        self.rings: list[_native.RingSender | _native.DeviceRingSender] = []  # of the senders

    def flush(self) -> None:
        """Nothing to wait for, ``send`` has copied; but what the consumers have mapped needs no descriptor any more."""
        for ring in self.rings:
            ring.close_descriptors()

    def close(self) -> None:
        self.senders.clear()
        self.receivers.clear()
        self.rings.clear()


class Forms:
    """The forms in which an end of an edge has sent messages, most of which have the same one."""

    MOST = 256
    """known at once: shapes may differ in every step of a long run"""

    def __init__(self, spec: EdgeSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        # By what it depends on, four things of each tensor. With each form, whether too much lies between elements, and
        # whether torch may have left something to the reader.
        self._known: dict[tuple[object, ...], tuple[_native.MessageForm, bool, bool]] = {}

    def of(self, tensors: Sequence[Tensor]) -> tuple[_native.MessageForm, Sequence[Tensor], list[int]]:
        """The form of a message, its tensors as their bytes can cross, and where those lie.

        Raises:
            InputError: as ``header.check_memory`` and ``header.pack_table``.
        """
        key: tuple[object, ...] = ()
        places = []
        try:
            for t in tensors:  # one loop: two comprehensions and a tuple of tuples take 40 % longer
                if t.device != self._device:
                    check_memory(self._spec, tensors, self._device)
                key += (t.shape, t.stride(), t.dtype, t.requires_grad)
                places.append(t.data_ptr())
        except RuntimeError:  # of a tensor that is not dense
            check_memory(self._spec, tensors, self._device)
            raise
        form, spread, maybe_lazy = self._known.get(key) or self._learn(key, tensors)
        if not spread and not (maybe_lazy and any(t.is_neg() or t.is_conj() for t in tensors)):
            return form, tensors, places
        sent = [as_sent(tensor) for tensor in tensors]
        wanted = zip(form_of(sent), tensors, strict=True)
        form = _native.MessageForm(*pack_table([replace(s, wants_gradient=t.requires_grad) for s, t in wanted]))
        return form, sent, [t.data_ptr() for t in sent]

    def _learn(self, key: tuple[object, ...], tensors: Sequence[Tensor]) -> tuple[_native.MessageForm, bool, bool]:
        form = form_of(tensors)
        spread = any(is_spread(tensor) for tensor in tensors)
        # A conjugation or, seen through .imag, a negation, which has a stride of 2 at least or one element.
        maybe_lazy = any(t.is_complex() or t.numel() == 1 or not t.is_contiguous() for t in tensors)
        if len(self._known) == self.MOST:
            self._known.clear()
        self._known[key] = found = _native.MessageForm(*pack_table(form)), spread, maybe_lazy
        return found


class HostSender:
    """The producer's end of an edge; ``send`` has copied when it returns."""

    def __init__(self, world: HostWorld, spec: EdgeSpec, ring: _native.RingSender) -> None:
        self._world, self._spec, self._ring = world, spec, ring
        self._forms = Forms(spec, _MEMORY)

    @property
    def buffers(self) -> Buffers:
        return Buffers(self._ring.nbytes, self._ring.grown)

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        form, _sent, places = self._forms.of(tensors)  # the places are those of tensors that may be new
        try:
            self._ring.send(form, places, step, microbatch)
        except _native.Aborted as ending:
            raise self._world.peer_error(ending) from None


class Tables:
    """What has arrived at an end of an edge, most of it in the same form."""

    def __init__(self) -> None:
        self._form: Form = ()
        self._plain = False  # nothing is left to do to the tensors
        self._problem: MessageMismatch | None = None  # of the last table: it is told only once

    @property
    def form(self) -> Form:
        """Of the last message.

        Raises:
            MessageMismatch: no pipex writes such a table.
        """
        if self._problem is not None:
            raise self._problem
        return self._form

    def learn(self, seen: tuple[bytes, int]) -> None:
        """Takes the table of a message, where it is another than that of the message before it."""
        try:
            self._form, _ = read_table(seen[0])
            self._problem = None
        except MessageMismatch as error:
            self._problem = error
        self._plain = self._problem is None and not any(t.dtype in AS_BYTES or t.wants_gradient for t in self._form)

    def tensors(self, capsules: Sequence[object]) -> tuple[Tensor, ...]:
        """The tensors of a message of the learned form. Raises as ``form``."""
        if self._plain:
            return tuple(map(from_dlpack, capsules))
        tensors = []
        for capsule, form in zip(capsules, self.form, strict=True):
            tensor = from_dlpack(capsule)
            if tensor.dtype is not form.dtype:
                tensor = tensor.view(form.dtype)
            tensors.append(tensor.requires_grad_() if form.wants_gradient else tensor)
        return tuple(tensors)


class HostReceiver:
    """The consumer's end of an edge."""

    def __init__(self, world: HostWorld, spec: EdgeSpec, ring: _native.RingReceiver) -> None:
        self._world, self._spec, self._ring = world, spec, ring
        self._tables = Tables()

    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]:
        try:
            seen, capsules = self._ring.receive(step, microbatch)
        except _native.Aborted as ending:
            raise self._world.peer_error(ending) from None
        except _native.HeaderMismatch as error:
            raise mismatch(self._spec, *map(describe, error.args)) from None
        if seen is not None:
            self._tables.learn(seen)
        return self._tables.tensors(capsules)
