"""What the runtime needs of a transport: a world of ranks, and edges between stages.

Back ends: ``host`` (shared memory between the processes of a host), ``device`` (their GPUs' memory, or ``staged`` over
the host's), ``group`` (torch.distributed, any host), ``solo`` (one rank, no peers) and, for edges within a rank,
``local``. The runtime never asks which one it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol

import torch
from torch import Tensor

EdgeKind = Literal["activation", "gradient", "tied"]


@dataclass(frozen=True, slots=True)
class TensorForm:
    """What a message says of one of its tensors.

    Attributes:
        shape, dtype: of the tensor.
        strides: in elements. They cross as they are, since what a kernel adds in which order can depend on them.
        wants_gradient: whether the sender has a graph behind it, and so waits for its gradient.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    wants_gradient: bool = False

    @property
    def nbytes(self) -> int:
        """From the first element to the last, with what lies between them."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


Form = tuple[TensorForm, ...]
"""The tensors of one message, in order."""


def form_of(tensors: Sequence[Tensor]) -> Form:
    """The form of a message of these tensors."""
    return tuple(TensorForm(tuple(t.shape), t.dtype, t.stride(), t.requires_grad) for t in tensors)


@dataclass(frozen=True, slots=True)
class EdgeSpec:
    """One directed link, as all ranks agree on it before the first step.

    Attributes:
        source, destination: stages (for kind ``tied`` too).
        source_rank, destination_rank: where they live.
        slots: messages that may be under way, so that a send within the plan never waits.
        alive: received messages that the plan keeps in use at once; sizes the receive pool.
    """

    source: int
    destination: int
    kind: EdgeKind
    source_rank: int
    destination_rank: int
    slots: int
    alive: int

    def __str__(self) -> str:
        return f"{self.kind} edge {self.source}→{self.destination} (rank {self.source_rank}→{self.destination_rank})"


@dataclass(frozen=True, slots=True)
class Buffers:
    """Memory of one end of an edge.

    Attributes:
        nbytes: of all its buffers now.
        grown: how often they had to become larger, the first message not counted. Not with every message that is
            larger than all before it, where they are made larger than asked.
    """

    nbytes: int
    grown: int


class Sender(Protocol):
    """The producer's end of an edge."""

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        """Hands a message over, in plan order: dense tensors, any number of any shapes. Never waits while the plan's
        slots hold; buffers grow where a message is larger than all before it.

        The tensors must not be written to before ``Links.flush`` returns (a copying back end may be done earlier), but
        for activations that require no grad: a stage may keep what it hands on, and change it in its next forward.

        Raises:
            InputError: a tensor is sparse, on another device, of more than 8 dimensions, or of a dtype that cannot
                cross.
            OutOfSharedMemory, OutOfDeviceMemory: there is no memory for a larger message.
            PeerError: another rank ended the run.
        """

    @property
    def buffers(self) -> Buffers:
        """What the edge's messages have needed until now, at this end."""


class Receiver(Protocol):
    """The consumer's end of an edge. As many messages as the edge has slots arrive without being asked for. Over NCCL
    only their headers and the first 32 rows of their tables do; over Gloo also their bodies, but none that is larger
    than all that were received when its receive was posted."""

    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]:
        """Waits for the next message and returns its tensors: of the shapes, dtypes and strides sent, without a graph,
        and with ``requires_grad`` where the sender's had it. They belong to the caller: their memory is not used again
        before the last reference (autograd's saved tensors and views included) is gone.

        Raises:
            MessageMismatch: the message is not that of (step, microbatch) on this edge.
            OutOfSharedMemory, OutOfDeviceMemory: there is no memory for a larger message.
            PeerError: another rank ended the run.
        """


class Links(Protocol):
    """This rank's ends of all opened edges."""

    senders: dict[tuple[int, int, EdgeKind], Sender]
    receivers: dict[tuple[int, int, EdgeKind], Receiver]
    first_position: int
    """what ``World.at`` is told at the first action of the plan's orders; its own for every plan of a world"""

    def flush(self) -> None:
        """Waits until every sent tensor may be written to again; called once at the end of a step, and before the
        exchange that ends it: once all ranks have flushed, all that was sent has arrived."""

    def close(self) -> None:
        """Frees this rank's ends. Safe to repeat."""


class Phase(IntEnum):
    """What a rank is doing outside the plan's actions: positions below 0."""

    SETUP = -1
    IDLE = -2  # user code between steps
    START = -3
    REDUCE = -4
    OPTIMIZER = -5
    SAVING = -6
    CLOSING = -7
    EVALUATING = -8


class Act(Protocol):
    """An action of a plan; ``str`` gives its text, such as ``2F0``."""

    @property
    def stage(self) -> int: ...
    @property
    def microbatch(self) -> int: ...


Orders = Sequence[Sequence[Act]]
"""Per rank what it does in a step, one action after another."""


class World(Protocol):
    """The ranks of one run, as seen from one of them."""

    rank: int
    ranks: int
    device: torch.device
    """where this rank's stages live; ``receive`` returns tensors there"""

    def exchange(self, payload: bytes) -> list[bytes]:
        """All-gather of byte strings in rank order; returns on every rank once all have called it.

        Raises:
            InputError: more than 64 MiB.
            PeerError: another rank ended the run.
        """

    def at(self, step: int, position: int) -> None:
        """Publishes what this rank does next: a ``Phase``, or an action, as its place in the rank's order plus the
        ``first_position`` of the plan's links. Costs well under 1 µs."""

    def open(self, specs: Sequence[EdgeSpec], digest: bytes, orders: Orders = ()) -> Links:
        """Collective: opens all edges between ranks in the given order, the same on every rank.

        Args:
            digest: the plan's (16 bytes); stands in every message.
            orders: the plan's, by which a rank that fails is named; may be left out where nobody publishes positions.

        Raises:
            ConfigMismatch: ranks gave different edges or digests.
            OutOfSharedMemory, OutOfDeviceMemory: there is no memory for the buffers.
            PeerError: another rank ended the run.
        """

    def fail(self, error: BaseException) -> None:
        """Tells all ranks that this one ends with ``error``. The first failure of a run wins; never raises."""

    def close(self) -> None:
        """Collective, after the last step: waits for all ranks, then leaves. Nothing is left behind."""
