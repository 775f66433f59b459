"""The two ends of an edge over torch.distributed.

A message is its head (header and table, always through CPU memory) and its body, the bytes of its tensors. Nothing
moves before its receive is posted, so a receiver has one posted for each of the edge's slots, from the opening on.
With NCCL a posted receive is a kernel that spins on the GPU until the peer sends, so there only heads are received
ahead, and the body when its head has told its size. With Gloo both are, so that they arrive while the stage computes.

How large a message will be is not known when its receive is posted, and it must not be larger than that one has room
for (Gloo ends the process that gets more; it may be smaller, and only what there is travels). So both ends know the
room without a word: that for message j has been posted when message j - slots was taken, with room for the largest body
until then. A body that does not fit goes another way, whole, received once its head has been read; the posted receive
gets nothing. In the same way goes what a table has too many rows for a head.

Everything that a message says is proven before it is used: first the header, which tells how long the table is, then
the table, which tells how long the body is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.distributed import Work

from pipex import _native
from pipex.errors import MessageMismatch, OutOfDeviceMemory, OutOfSharedMemory, PipexError
from pipex.transport import header
from pipex.transport.group.watch import Watch
from pipex.transport.header import Header
from pipex.transport.interface import Buffers, EdgeKind, EdgeSpec, Form, Receiver, Sender, TensorForm

HEAD_ROWS = 32
"""Rows of a table that go with its header; a message of more tensors takes another round trip."""
HEAD_BYTES = header.SIZE + HEAD_ROWS * header.RECORD.size


class Group(Protocol):
    """What pipex uses of torch.distributed's backends (torch's own stubs leave it out)."""

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Work: ...
    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Work: ...
    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> Work: ...
    def abort(self) -> None: ...


class Ended:
    """In place of a group that is gone."""

    def send(self, *_: object) -> Work:
        raise PipexError("the world is closed")

    recv = recv_anysource = send

    def abort(self) -> None: ...


@dataclass(slots=True)
class Lane:
    """What an end of an edge sends through.

    Attributes:
        control: group of all ranks in CPU memory.
        peer: the other end's rank in ``control``.
        tag: of heads; the next two are the edge's own too.
        payload, payload_peer: group for the bodies and the other end's rank in it.
        staging: device whose memory ``payload`` reads and writes.
        device: where the tensors live.
    """

    TAGS: ClassVar[int] = 3

    control: Group
    peer: int
    tag: int
    payload: Group
    payload_peer: int
    staging: torch.device
    device: torch.device

    def end(self) -> None:
        """Lets go of the groups, which end with their last reference."""
        self.control = self.payload = Ended()

    @property
    def ahead(self) -> bool:
        """Whether bodies are received ahead, as heads are."""
        return self.payload is self.control

    @property
    def body_tag(self) -> int:
        """Of what goes into receives that are posted ahead."""
        return self.tag + 1

    @property
    def late_tag(self) -> int:
        """Of what the head has to be read for: first the rest of the table, then the body."""
        return self.tag + 2


class GroupSender:
    """The producer's end. Keeps what it sends alive until it is sent, for at most ``spec.slots`` messages."""

    def __init__(self, spec: EdgeSpec, digest: bytes, lane: Lane, watch: Watch) -> None:
        self._spec, self._digest, self._lane, self._watch = spec, digest, lane, watch
        self._sequence = 0
        self._largest = self._grown = 0
        self._room = 0  # of the receive that the last message found posted
        self._sizes = deque([0] * spec.slots)  # of the messages before, whose takers have posted or will
        self._under_way: deque[list[tuple[Work, Tensor]]] = deque()

    @property
    def buffers(self) -> Buffers:
        return Buffers(self._spec.slots * self._largest, self._grown)

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        spec, lane = self._spec, self._lane
        header.check_memory(spec, tensors, lane.device)
        sent = [header.as_sent(tensor) for tensor in tensors]
        form = tuple(
            TensorForm(tuple(as_sent.shape), as_sent.dtype, as_sent.stride(), tensor.requires_grad)
            for as_sent, tensor in zip(sent, tensors, strict=True)
        )
        table, nbytes = header.pack_table(form)
        while len(self._under_way) >= spec.slots:
            self._wait_oldest()
        if len(tensors) == 1 and spec.kind == "activation" and not tensors[0].requires_grad:
            sent = [header.copied(tensors[0])]  # those of several tensors are copied together
        body = _body(sent, form, table, nbytes, lane.staging)
        raw = Header(
            self._digest, spec.source, spec.destination, spec.kind, len(tensors), microbatch, step, self._sequence,
            nbytes,
        ).pack()  # fmt: skip
        head, late = raw + table[: HEAD_BYTES - len(raw)], table[HEAD_BYTES - len(raw) :]
        room = self._next_room(nbytes)
        self._sequence += 1
        self._under_way.append(under_way := [])
        with self._watch.waiting(lane.peer, spec):

            def start(group: Group, memory: Tensor, peer: int, tag: int) -> None:
                under_way.append((group.send([memory], peer, tag), memory))

            start(lane.control, _as_tensor(bytearray(head)), lane.peer, lane.tag)
            if late:
                start(lane.control, _as_tensor(bytearray(late)), lane.peer, lane.late_tag)
            if room:
                start(lane.payload, body if nbytes <= room else body[:0], lane.payload_peer, lane.body_tag)
            if nbytes > room:
                start(lane.payload, body, lane.payload_peer, lane.late_tag)

    def _next_room(self, nbytes: int) -> int:
        """The bytes that the posted receive of the next message has room for; that one has ``nbytes``."""
        self._grown += 0 < self._largest < nbytes
        self._largest = max(self._largest, nbytes)
        self._sizes.append(nbytes)
        self._room = max(self._room, self._sizes.popleft())
        return self._room if self._lane.ahead else 0

    def flush(self) -> None:
        """Waits until every sent tensor may be written to again."""
        while self._under_way:
            self._wait_oldest()

    def close(self) -> None:
        self._lane.end()
        self._under_way.clear()

    def _wait_oldest(self) -> None:
        with self._watch.waiting(self._lane.peer, self._spec):
            for work, _ in self._under_way[0]:
                work.wait()
        self._under_way.popleft()


@dataclass(slots=True)
class _Arrival:
    """A message whose receive is posted.

    Attributes:
        head: where header and table are written, by ``announced``.
        body: uint8[room], written by ``arrived``; None where no room is known to be needed.
    """

    head: bytearray
    announced: Work
    body: Tensor | None = None
    arrived: Work | None = None


class GroupReceiver:
    """The consumer's end."""

    def __init__(self, spec: EdgeSpec, digest: bytes, lane: Lane, watch: Watch) -> None:
        self._spec, self._digest, self._lane, self._watch = spec, digest, lane, watch
        self._sequence = 0
        self._room = 0
        self._posted: deque[_Arrival] = deque()
        while len(self._posted) < spec.slots:
            self._post()

    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]:
        lane = self._lane
        with self._watch.waiting(lane.peer, self._spec):
            if not self._posted:
                raise PipexError("the world is closed")
            arrival = self._posted.popleft()
            arrival.announced.wait()
        table, nbytes = self._table(bytes(arrival.head), step, microbatch)
        form, offsets = proven(table, nbytes)
        body = self._body(arrival, nbytes)
        self._sequence += 1
        if lane.ahead:
            self._room = max(self._room, nbytes)
        self._post()
        # One by one, so that none keeps the others' memory, nor much of a larger message's.
        alone = len(form) == 1 and 2 * nbytes >= body.numel()
        return tuple(
            _tensor(body[begin : begin + one.nbytes].to(lane.device, copy=not alone), one)
            for one, begin in zip(form, offsets, strict=True)
        )

    def _table(self, head: bytes, step: int, microbatch: int) -> tuple[bytes, int]:
        """The table of the message and the bytes of its body, once it is known to be the one that comes next."""
        spec, lane = self._spec, self._lane
        raw = head[: header.SIZE]
        *_, count, _, _, _, nbytes = header.LAYOUT.unpack(raw)
        needed = Header(
            self._digest, spec.source, spec.destination, spec.kind, count, microbatch, step, self._sequence, nbytes
        ).pack()
        if raw != needed:
            raise header.mismatch(spec, header.describe(raw), header.describe(needed))
        if count > header.MAX_TENSORS:
            raise _impossible(f"{count} tensors", f"at most {header.MAX_TENSORS}")
        rows = count * header.RECORD.size
        table = head[header.SIZE :][:rows]
        if len(table) < rows:
            late = bytearray(rows - len(table))
            with self._watch.waiting(lane.peer, spec):
                lane.control.recv([_as_tensor(late)], lane.peer, lane.late_tag).wait()
            table += late
        return table, nbytes

    def _body(self, arrival: _Arrival, nbytes: int) -> Tensor:
        """What begins with the ``nbytes`` of the message."""
        lane = self._lane
        if arrival.arrived is not None:
            with self._watch.waiting(lane.peer, self._spec):
                arrival.arrived.wait()
        if arrival.body is not None and nbytes <= arrival.body.numel():
            return arrival.body
        arrival.body = None
        body = _new(nbytes, lane.staging)
        if nbytes:
            with self._watch.waiting(lane.peer, self._spec):
                # With NCCL it is the current stream that waits.
                lane.payload.recv([body], lane.payload_peer, lane.late_tag).wait()
        return body

    def close(self) -> None:
        self._lane.end()
        self._posted.clear()

    def _post(self) -> None:
        """Starts to receive one more message.

        Always into new memory: autograd may keep a received tensor as long as it likes, and nothing tells a pool when
        it lets go. An allocation costs little beside the network.
        """
        lane = self._lane
        head = bytearray(HEAD_BYTES)
        body = _new(self._room, lane.staging) if self._room else None
        with self._watch.waiting(lane.peer, self._spec):
            arrival = _Arrival(head, lane.control.recv([_as_tensor(head)], lane.peer, lane.tag), body)
            if body is not None:
                arrival.arrived = lane.payload.recv([body], lane.payload_peer, lane.body_tag)
        self._posted.append(arrival)


@lru_cache(maxsize=256)  # almost all messages of a run have few forms
def proven(table: bytes, nbytes: int) -> tuple[Form, tuple[int, ...]]:
    """What the tensors of a message with a body of ``nbytes`` are, and where in it each begins.

    Raises:
        MessageMismatch: the table says what cannot be.
    """
    _native.MessageForm(table, nbytes)
    form, offsets = header.read_table(table)
    needed = max((begin + tensor.nbytes for tensor, begin in zip(form, offsets, strict=True)), default=0)
    if nbytes != needed:
        raise _impossible(f"{nbytes} bytes", f"{needed}, as its tensors take")
    return form, offsets


def _impossible(got: object, needed: str) -> MessageMismatch:
    return MessageMismatch("a message between two ranks says what cannot be", got=got, needed=needed,
                           fix="use one version of pipex on all ranks")  # fmt: skip


def _body(sent: Sequence[Tensor], form: Form, table: bytes, nbytes: int, device: torch.device) -> Tensor:
    """The bytes of a message's tensors, on ``device``; those of a single tensor where they are, if it is there."""
    if len(sent) == 1:
        return _bytes_of(sent[0], form[0]).to(device)
    body = _new(nbytes, device)
    _, offsets = header.read_table(table)
    for tensor, one, begin in zip(sent, form, offsets, strict=True):
        body[begin : begin + one.nbytes].copy_(_bytes_of(tensor, one))
    return body


def _bytes_of(tensor: Tensor, form: TensorForm) -> Tensor:
    """uint8[form.nbytes] over a tensor's memory, with what lies between its elements."""
    return tensor.as_strided((form.nbytes // form.dtype.itemsize,), (1,)).view(torch.uint8)


def _tensor(memory: Tensor, form: TensorForm) -> Tensor:
    """The tensor whose bytes these are. Not a view of them: autograd counts changes in place for all views together."""
    tensor = torch.empty(0, dtype=form.dtype, device=memory.device)
    tensor.set_(memory.untyped_storage(), memory.storage_offset() // form.dtype.itemsize, form.shape, form.strides)
    return tensor.requires_grad_() if form.wants_gradient else tensor


def _new(nbytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        # In host memory torch has no type of its own for it.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        of_device = OutOfDeviceMemory if device.type == "cuda" else OutOfSharedMemory
        raise of_device("there is no memory for a message between stages", got=f"{nbytes} bytes",
                        fix="use smaller micro-batches") from error  # fmt: skip


def _as_tensor(memory: bytearray) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)


class GroupLinks:
    """This rank's ends of the opened edges."""

    def __init__(self, first_position: int) -> None:
        self.first_position = first_position
        self.senders: dict[tuple[int, int, EdgeKind], Sender] = {}
        self.receivers: dict[tuple[int, int, EdgeKind], Receiver] = {}
        self._ends: list[GroupSender | GroupReceiver] = []

    def add(self, spec: EdgeSpec, end: GroupSender | GroupReceiver) -> None:
        key = (spec.source, spec.destination, spec.kind)
        if isinstance(end, GroupSender):
            self.senders[key] = end
        else:
            self.receivers[key] = end
        self._ends.append(end)

    def flush(self) -> None:
        for end in self._ends:
            if isinstance(end, GroupSender):
                end.flush()

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for ends in (self.senders, self.receivers, self._ends):
            ends.clear()
