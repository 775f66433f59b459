"""The world of a program that was not launched: one rank, nobody to talk to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipex.transport.interface import EdgeKind, EdgeSpec, Orders, Receiver, Sender


class SoloLinks:
    """No edges."""

    def __init__(self) -> None:
        self.senders: dict[tuple[int, int, EdgeKind], Sender] = {}
        self.receivers: dict[tuple[int, int, EdgeKind], Receiver] = {}
        self.first_position = 0

    def flush(self) -> None: ...

    def close(self) -> None: ...


class SoloWorld:
    """One rank (``pipex.transport.interface.World``)."""

    rank = 0
    ranks = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def exchange(self, payload: bytes) -> list[bytes]:
        return [payload]

    def at(self, step: int, position: int) -> None: ...

    def open(self, specs: Sequence[EdgeSpec], digest: bytes, orders: Orders = ()) -> SoloLinks:
        assert not specs, "one rank has no edges to other ranks"
        return SoloLinks()

    def fail(self, error: BaseException) -> None: ...

    def close(self) -> None: ...
