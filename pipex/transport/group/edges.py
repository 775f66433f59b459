"""The two ends of an edge over torch.distributed.

A tensor is two messages: its header (128 bytes, always through CPU memory) and its bytes. Both ends of a message must
agree on its size, which no backend checks (measured: a longer one than Gloo expects ends the process, a shorter one
passes in silence, and NCCL hangs). So the bytes are always as many as the edge was opened for, the last of them unused
where a micro-batch is smaller. Of a message with a larger tensor, and of all behind it, only the headers go: the
receiver names the mistake by them, and takes no other tensor's bytes for those that are missing.

Nothing moves before its receive is posted, so a receiver has one posted for each of the edge's slots, from the opening
on. With Gloo that holds for header and bytes, which arrive while the stage computes. With NCCL a posted receive is a
kernel that spins on the GPU until the peer sends, so there only headers are received ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import Work

from pipex.transport import header
from pipex.transport.group.watch import Watch
from pipex.transport.header import Header
from pipex.transport.interface import (
    EdgeKind,
    EdgeSpec,
    Form,
    Receiver,
    Sender,
    TensorForm,
    form_of,
)


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

    @property
    def ahead(self) -> bool:
        """Whether bytes are received ahead, as headers are."""
        return self.payload is self.headers


def flat_bytes(tensor: Tensor) -> Tensor:
    """All bytes of a contiguous tensor, as uint8[nbytes] over the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


class GroupSender:
    """The producer's end. Keeps what it sends alive until it is sent, for at most ``spec.slots`` messages."""

    def __init__(self, spec: EdgeSpec, digest: bytes, lane: Lane, watch: Watch) -> None:
        self._spec, self._digest, self._lane, self._watch = spec, digest, lane, watch
        self._sequence = 0
        self._fits = True  # no message yet was larger than the edge was opened for
        self._under_way: deque[list[tuple[Work, Work | None, Tensor | None]]] = deque()

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        spec, lane = self._spec, self._lane
        check_number(spec, tensors)
        while len(self._under_way) >= spec.slots:
            self._wait_oldest()
        message = []
        forms = form_of(tensors)
        self._fits = self._fits and all(form.nbytes <= most.nbytes for form, most in zip(forms, spec.form, strict=True))
        for index, (tensor, form, most) in enumerate(zip(tensors, forms, spec.form, strict=True)):
            raw = Header(
                self._digest, spec.source, spec.destination, spec.kind, index, microbatch, step, self._sequence, form
            ).pack()
            announcement = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            payload = self._payload(tensor, most.nbytes) if self._fits and most.nbytes else None
            with self._watch.waiting(lane.peer, spec):
                announced = lane.headers.send([announcement], lane.peer, lane.tag)
                sent = None if payload is None else lane.payload.send([payload], lane.payload_peer, lane.tag + 1)
            message.append((announced, sent, payload))
        self._sequence += 1
        self._under_way.append(message)

    def _payload(self, tensor: Tensor, nbytes: int) -> Tensor:
        """A tensor's bytes and, if it has fewer than ``nbytes``, zeros behind them."""
        # Conjugates and negatives are views that carry only a flag; their bytes are another number's.
        found = flat_bytes(tensor.detach().resolve_conj().resolve_neg().contiguous()).to(self._lane.staging)
        if found.numel() == nbytes:
            return found
        payload = found.new_zeros(nbytes)
        payload[: found.numel()] = found
        return payload

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


@dataclass(slots=True)
class _Arrival:
    """One tensor of a message whose receive is posted.

    Attributes:
        header: where its header is written, by ``announced``.
        payload: uint8[bytes that the edge was opened for], written by ``arrived``; both None where that is not posted.
    """

    header: bytearray
    announced: Work
    payload: Tensor | None = None
    arrived: Work | None = None


class GroupReceiver:
    """The consumer's end."""

    def __init__(self, spec: EdgeSpec, digest: bytes, lane: Lane, watch: Watch) -> None:
        self._spec, self._digest, self._lane, self._watch = spec, digest, lane, watch
        self._sequence = 0
        self._posted: deque[list[_Arrival]] = deque()
        while len(self._posted) < spec.slots:
            self._post()

    def receive(self, step: int, microbatch: int, form: Form) -> tuple[Tensor, ...]:
        spec, lane = self._spec, self._lane
        check_fits(spec, form)
        message = self._posted.popleft()
        for index, (arrival, expected) in enumerate(zip(message, form, strict=True)):
            needed = Header(
                self._digest, spec.source, spec.destination, spec.kind, index, microbatch, step, self._sequence,
                expected,
            )  # fmt: skip
            with self._watch.waiting(lane.peer, spec):
                arrival.announced.wait()
            if arrival.header != needed.pack():
                raise header.mismatch(spec, header.describe(bytes(arrival.header)), str(needed))
            if not lane.ahead:
                self._post_payload(arrival, spec.form[index].nbytes)
        self._sequence += 1
        with self._watch.waiting(lane.peer, spec):
            for arrival in message:
                if arrival.arrived is not None:
                    arrival.arrived.wait()  # with NCCL it is the current stream that waits
        self._post()
        return tuple(self._tensor(arrival, expected) for arrival, expected in zip(message, form, strict=True))

    def _post(self) -> None:
        """Starts to receive one more message."""
        lane = self._lane
        message = []
        for most in self._spec.form:
            raw = bytearray(header.SIZE)
            with self._watch.waiting(lane.peer, self._spec):
                work = lane.headers.recv([torch.frombuffer(raw, dtype=torch.uint8)], lane.peer, lane.tag)
            message.append(_Arrival(raw, work))
            if lane.ahead:
                self._post_payload(message[-1], most.nbytes)
        self._posted.append(message)

    def _post_payload(self, arrival: _Arrival, nbytes: int) -> None:
        """Always into new memory: autograd may keep a received tensor as long as it likes, and nothing tells a pool
        when it lets go. An allocation costs little beside the network."""
        lane = self._lane
        if nbytes:
            arrival.payload = torch.empty(nbytes, dtype=torch.uint8, device=lane.staging)
            with self._watch.waiting(lane.peer, self._spec):
                arrival.arrived = lane.payload.recv([arrival.payload], lane.payload_peer, lane.tag + 1)

    def _tensor(self, arrival: _Arrival, form: TensorForm) -> Tensor:
        if arrival.payload is None:
            return torch.empty(form.shape, dtype=form.dtype, device=self._lane.device)
        found = arrival.payload[: form.nbytes].view(form.dtype).view(form.shape)
        return found.to(self._lane.device)


class GroupLinks:
    """This rank's ends of the opened edges."""

    def __init__(self, first_position: int) -> None:
        self.first_position = first_position
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
