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
    """Another tensor arrived; args are both headers (got, needed)."""

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

class TensorTemplate:
    """One announced tensor: its packed header, its shape, and DLPack's code and bits of its dtype."""

    def __init__(self, header: bytes, shape: Sequence[int], code: int, bits: int) -> None: ...

class RingSender:
    """The producer's end of a ring for tensors of at most ``bytes``."""

    def __init__(self, member: Member, peer: int, address: bytes, bytes: int, under_way: int, alive: int) -> None: ...
    def send(self, tensor: TensorTemplate, data: int, step: int, microbatch: int) -> None: ...

class RingReceiver:
    """The consumer's end, which owns the memory: ``under_way`` + ``alive`` slots."""

    def __init__(self, member: Member, peer: int, bytes: int, under_way: int, alive: int) -> None: ...
    @property
    def address(self) -> bytes: ...
    @property
    def lent(self) -> int:
        """Slots that received tensors occupy now."""
    def close_descriptor(self) -> None: ...
    def receive(self, tensor: TensorTemplate, step: int, microbatch: int) -> object:
        """A DLPack capsule; its slot is free again with the last reference to torch's storage."""

class DeviceRank:
    """This process as a rank with a GPU, whose driver is the library at a path. ``device_type``: DLPack's, of the
    memory that the driver hands out."""

    def __init__(self, member: Member, library: str, ordinal: int, device_type: int) -> None: ...
    def missing(self) -> str:
        """What the GPU lacks for device rings, in words; empty where nothing."""
    @property
    def sent(self) -> int:
        """Tensors that have been copied from their source, in the order of the sends."""
    def flush(self) -> None: ...
    def free_retired(self) -> None:
        """Frees the memory of closed rings; all peers must have closed theirs."""
    def close(self) -> None: ...

class DeviceRingSender:
    """The producer's end of a ring in the consumer's device memory."""

    def __init__(self, rank: DeviceRank, peer: int, bytes: int, under_way: int, alive: int) -> None: ...
    @property
    def offer(self) -> bytes: ...
    def connect(self, address: bytes, offer: bytes) -> None: ...
    def send(self, tensor: TensorTemplate, source: int, stream: int, step: int, microbatch: int) -> None: ...
    def close(self) -> None: ...

class DeviceRingReceiver:
    """The consumer's end, which owns the memory of the payloads."""

    def __init__(self, rank: DeviceRank, peer: int, bytes: int, under_way: int, alive: int) -> None: ...
    @property
    def address(self) -> bytes: ...
    @property
    def offer(self) -> bytes: ...
    @property
    def lent(self) -> int:
        """Slots that received tensors occupy now."""
    def connect(self, offer: bytes) -> None: ...
    def close_descriptor(self) -> None: ...
    def receive(self, tensor: TensorTemplate, stream: int, step: int, microbatch: int) -> object | None:
        """A DLPack capsule; None, and nothing done, where ``alive`` slots are lent: call ``receive_into`` then."""
    def receive_into(self, tensor: TensorTemplate, to: int, stream: int, step: int, microbatch: int) -> None: ...
    def close(self) -> None: ...

class SchedulingProblem:
    """The native twin of pipex.plan.list_scheduler; sequences as the ``Problem`` and ``DueDates`` there have them."""

    def __init__(
        self,
        rank_of: Sequence[int],
        microbatches: int,
        durations: Sequence[Sequence[int]],
        activation_hop: Sequence[int],
        gradient_hop: Sequence[int],
        activation: Sequence[int],
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
