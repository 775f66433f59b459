"""The part of pipex in C++ that needs no CUDA toolkit (csrc/host, csrc/device): shared memory, rings, the watch over
peers, plans. Knows no torch.

Errors that people see are raised as classes of pipex.errors; the two below are for pipex.transport.host to translate.
"""

from collections.abc import Sequence

without_cuda: str
"""Why ``pipex._cuda`` was not built; empty where it was."""

class Aborted(Exception):
    """The run has ended; args are (kind "lost" | "stalled" | "failed", culprit, step, position, text)."""

class HeaderMismatch(Exception):
    """Another message arrived; args are both headers (got, needed)."""

class Control:
    """The control page of a run, as the launcher and every rank hold it."""

    def __init__(self, ranks: int) -> None: ...
    @staticmethod
    def attach(fd: int) -> Control: ...
    @staticmethod
    def open(address: bytes) -> Control: ...
    @property
    def ranks(self) -> int: ...
    @property
    def fd(self) -> int: ...
    @property
    def address(self) -> bytes: ...
    @property
    def aborted(self) -> bool: ...
    def raise_if_aborted(self) -> None: ...
    def lost(self, rank: int, text: str) -> None: ...
    def close_descriptor(self) -> None: ...

class Member:
    """This process as a rank of a run."""

    def __init__(self, control: Control, rank: int, timeout: float, spin: bool) -> None: ...
    @property
    def rank(self) -> int: ...
    def at(self, step: int, position: int) -> None: ...
    def exchange(self, payload: bytes) -> list[bytes]: ...
    def fail(self, text: str) -> None: ...
    def leave(self) -> None: ...

class MessageForm:
    """What the tensors of a message are: a table of pipex.transport.header, proven to lie within ``payload_bytes``."""

    def __init__(self, table: bytes, payload_bytes: int) -> None: ...

class RingSender:
    """The producer's end of a ring; ``header`` is that of the edge's first message."""

    def __init__(
        self, member: Member, peer: int, address: bytes, under_way: int, alive: int, header: bytes
    ) -> None: ...
    @property
    def grown(self) -> int:
        """How often slots had to become larger, the first one not counted."""
    @property
    def nbytes(self) -> int:
        """Of all slots now."""
    def close_descriptors(self) -> None:
        """Closes those of memory that the consumer has mapped; every send does so too."""
    def send(self, form: MessageForm, tensors: Sequence[int], step: int, microbatch: int) -> None:
        """Copies from the addresses ``tensors``."""

class RingReceiver:
    """The consumer's end: ``under_way`` + ``alive`` slots."""

    def __init__(self, member: Member, peer: int, under_way: int, alive: int, header: bytes) -> None: ...
    @property
    def address(self) -> bytes: ...
    @property
    def lent(self) -> int:
        """Slots that received tensors occupy now."""
    def close_descriptor(self) -> None: ...
    def receive(self, step: int, microbatch: int) -> tuple[tuple[bytes, int] | None, tuple[object, ...]]:
        """Table and bytes of the message's tensors, None where they are those of the message before it; and a DLPack
        capsule for each. The slot is free again with the last reference to torch's storages."""

class DeviceRank:
    """This process as a rank with a GPU, whose driver is the library at a path. ``device_type``: DLPack's, of the
    memory that the driver hands out."""

    def __init__(self, member: Member, library: str, ordinal: int, device_type: int) -> None: ...
    def missing(self) -> str:
        """What the GPU lacks for device rings, in words; empty where nothing."""
    @property
    def sent(self) -> int:
        """Messages that have been copied from their sources, in the order of the sends."""
    def flush(self) -> None: ...
    def free_retired(self) -> None:
        """Frees the memory of closed rings; all peers must have closed theirs."""
    def close(self) -> None: ...

class DeviceRingSender:
    """The producer's end of a ring in the consumer's device memory."""

    def __init__(self, rank: DeviceRank, peer: int, under_way: int, alive: int, header: bytes) -> None: ...
    @property
    def offer(self) -> bytes: ...
    def connect(self, address: bytes, offer: bytes) -> None: ...
    @property
    def grown(self) -> int:
        """How often the consumer has made larger payloads, the first ones not counted."""
    @property
    def nbytes(self) -> int:
        """Of all payloads and slots now."""
    def close_descriptors(self) -> None:
        """As of ``RingSender``."""
    def fits(self, form: MessageForm, stream: int) -> bool:
        """Whether such a message goes from device to device; else its tensors are sent from host memory."""
    def send(self, form: MessageForm, tensors: Sequence[int], stream: int, step: int, microbatch: int) -> None: ...
    def send_from_host(self, form: MessageForm, tensors: Sequence[int], step: int, microbatch: int) -> None: ...
    def close(self) -> None: ...

class DeviceRingReceiver:
    """The consumer's end, which owns the memory of the payloads."""

    def __init__(self, rank: DeviceRank, peer: int, under_way: int, alive: int, header: bytes) -> None: ...
    @property
    def address(self) -> bytes: ...
    @property
    def offer(self) -> bytes: ...
    @property
    def lent(self) -> int:
        """Slots that received tensors occupy now."""
    def connect(self, offer: bytes) -> None: ...
    def close_descriptor(self) -> None: ...
    def receive(
        self, stream: int, step: int, microbatch: int, may_grow: bool = True
    ) -> tuple[tuple[bytes, int] | None, tuple[object, ...] | None]:
        """As of ``RingReceiver``; no capsules, and nothing done, where ``alive`` slots are lent: call ``receive_into``
        then. Where there is no memory for larger payloads the message stays; without ``may_grow`` it is received, and
        none are made for one as small again."""
    def receive_into(self, to: Sequence[int], stream: int, step: int, microbatch: int) -> None: ...
    def close(self) -> None: ...

class SchedulingProblem:
    """The native twin of pipex.plan.list_scheduler; sequences as the ``Problem`` and ``DueDates`` there have them."""

    def __init__(
        self,
        rank_of: Sequence[int],
        passing: Sequence[int],
        durations: Sequence[Sequence[int]],
        activation_hop: Sequence[int],
        gradient_hop: Sequence[int],
        activation: Sequence[int],
        kept: Sequence[int],
        deferred: Sequence[int],
        limit: Sequence[int],
    ) -> None: ...
    def list_schedule(
        self,
        start: Sequence[int],
        offset: Sequence[Sequence[int]],
        release: Sequence[int],
        cap: Sequence[int],
        look: int,
        overrun: int,
    ) -> bytes | None: ...
    def replay(self, packed: bytes) -> tuple[int, int, tuple[int, ...]] | None: ...
    def improve(self, packed: bytes, seed: int, trials: int, of_span: bool) -> bytes: ...
