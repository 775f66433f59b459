"""The two ends of an edge over torch.distributed.

A tensor is two messages: its header (128 bytes, always through CPU memory) and its bytes. The receiver posts only
headers ahead of time, and posts the receive of the bytes when the header is the expected one, because the backends do
not check sizes themselves: Gloo takes a shorter message in silence and aborts the process on a longer one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import Work

from pipex.errors import MessageMismatch
from pipex.transport import header
from pipex.transport.group.watch import Watch
from pipex.transport.header import Header
from pipex.transport.interface import EdgeKind, EdgeSpec, Form, Receiver, Sender, form_of


class Group(Protocol):
    """What pipex uses of torch.distributed's backends (torch's own stubs leave it out)."""

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Work: ...
    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Work: ...
    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> Work: ...
    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Lane:
    """What an end of an edge sends through.

    Attributes:
        headers: group of all ranks in CPU memory; ``tag`` is the edge's own in it.
        peer: the other end's rank in ``headers``.
        payload, payload_peer: group for the tensors' bytes and the other end's rank in it.
        staging: device whose memory ``payload`` reads and writes.
        device: where the tensors live.
    """

    headers: Group
    tag: int
    peer: int
    payload: Group
    payload_peer: int
    staging: torch.device
    device: torch.device


def flat_bytes(tensor: Tensor) -> Tensor:
    """All bytes of a contiguous tensor, as uint8[nbytes] over the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


class GroupSender:
    """The producer's end. Keeps what it sends alive until it is sent, for at most ``spec.slots`` messages."""

    def __init__(self, spec: EdgeSpec, digest: bytes, lane: Lane, watch: Watch) -> None:
        self._spec, self._digest, self._lane, self._watch = spec, digest, lane, watch
        self._sequence = 0
        self._under_way: deque[list[tuple[Work, Work | None, Tensor]]] = deque()

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        spec, lane = self._spec, self._lane
        if len(tensors) != len(spec.form):
            raise MessageMismatch(
                f"stage {spec.source} returned another number of tensors than announced",
                got=len(tensors), needed=len(spec.form), fix="return the same number for every micro-batch",
            )  # fmt: skip
        while len(self._under_way) >= spec.slots:
            self._wait_oldest()
        message = []
        for index, (tensor, form) in enumerate(zip(tensors, form_of(tensors), strict=True)):
            raw = Header(
                self._digest, spec.source, spec.destination, spec.kind, index, microbatch, step, self._sequence, form
            ).pack()
            announcement = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            # Conjugates and negatives are views that carry only a flag; their bytes are another number's.
            payload = flat_bytes(tensor.detach().resolve_conj().resolve_neg().contiguous()).to(lane.staging)
            with self._watch.waiting(lane.peer, spec):
                announced = lane.headers.send([announcement], lane.peer, lane.tag)
                sent = lane.payload.send([payload], lane.payload_peer, lane.tag + 1) if form.nbytes else None
            message.append((announced, sent, payload))
            self._sequence += 1
        self._under_way.append(message)

    def flush(self) -> None:
        """Waits until every sent tensor may be written to again."""
        while self._under_way:
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        with self._watch.waiting(self._lane.peer, self._spec):
            for announced, sent, _ in self._under_way[0]:
                announced.wait()
                if sent is not None:
                    sent.wait()
        self._under_way.popleft()


class GroupReceiver:
    """The consumer's end."""

    def __init__(self, spec: EdgeSpec, digest: bytes, lane: Lane, watch: Watch) -> None:
        self._spec, self._digest, self._lane, self._watch = spec, digest, lane, watch
        self._sequence = 0
        self._posted: deque[list[tuple[bytearray, Work]]] = deque()

    def post(self, step: int, microbatch: int) -> None:
        lane = self._lane
        message = []
        with self._watch.waiting(lane.peer, self._spec):
            for _ in self._spec.form:
                raw = bytearray(header.SIZE)
                work = lane.headers.recv([torch.frombuffer(raw, dtype=torch.uint8)], lane.peer, lane.tag)
                message.append((raw, work))
        self._posted.append(message)

    def receive(self, step: int, microbatch: int, form: Form) -> tuple[Tensor, ...]:
        spec, lane = self._spec, self._lane
        if not self._posted:
            self.post(step, microbatch)
        tensors: list[Tensor] = []
        arrivals: list[Work] = []
        for index, ((raw, announced), expected) in enumerate(zip(self._posted.popleft(), form, strict=True)):
            needed = Header(
                self._digest,
                spec.source,
                spec.destination,
                spec.kind,
                index,
                microbatch,
                step,
                self._sequence,
                expected,
            ).pack()
            with self._watch.waiting(lane.peer, spec):
                announced.wait()
            if raw != needed:
                raise header.mismatch(spec, bytes(raw), needed)
            self._sequence += 1
            # Always new memory: autograd may keep a received tensor as long as it likes, and nothing tells a pool
            # when it lets go. An allocation costs little beside the network.
            tensor = torch.empty(expected.shape, dtype=expected.dtype, device=lane.staging)
            if expected.nbytes:
                with self._watch.waiting(lane.peer, spec):
                    arrivals.append(lane.payload.recv([flat_bytes(tensor)], lane.payload_peer, lane.tag + 1))
            tensors.append(tensor)
        with self._watch.waiting(lane.peer, spec):
            for arrival in arrivals:
                arrival.wait()  # with NCCL it is the current stream that waits
        return tuple(tensor.to(lane.device) for tensor in tensors)


class GroupLinks:
    """This rank's ends of the opened edges."""

    def __init__(self) -> None:
        self.senders: dict[tuple[int, int, EdgeKind], Sender] = {}
        self.receivers: dict[tuple[int, int, EdgeKind], Receiver] = {}
        self._sending: list[GroupSender] = []

    def add(self, spec: EdgeSpec, end: GroupSender | GroupReceiver) -> None:
        key = (spec.source, spec.destination, spec.kind)
        if isinstance(end, GroupSender):
            self.senders[key] = end
            self._sending.append(end)
        else:
            self.receivers[key] = end

    def flush(self) -> None:
        for sender in self._sending:
            sender.flush()

    def close(self) -> None:
        self.senders.clear()
        self.receivers.clear()
        self._sending.clear()
