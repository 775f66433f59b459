"""The two ends of a message between two ranks, as each provider of ``pipex bench p2p`` has them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class End(Protocol):
    """One rank's part in the bursts of a provider."""

    @property
    def send_seconds(self) -> Sequence[float]:
        """What the host needed for a send, of each timed burst the mean."""

    def transfer(self, outgoing: Sequence[Tensor]) -> Tensor | None:
        """All messages of a burst, which the GPU may still have to do, on the current stream. Returns the last one that
        this rank received."""

    def run(self, outgoing: Sequence[Tensor]) -> tuple[float, Tensor | None]:
        """The same until the GPU has done them, timed: seconds per message, and the last one received."""


class Sends(Protocol):
    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None: ...


class Receives(Protocol):
    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]: ...


class RoundTrips:
    """Messages to the other rank and back; or, ``both_ways``, to each other at the same time."""

    def __init__(self, rank: int, device: torch.device, sender: Sends, receiver: Receives, both_ways: bool) -> None:
        self._rank, self._device, self._both_ways = rank, device, both_ways
        self._sender, self._receiver = sender, receiver
        self.send_seconds: list[float] = []
        self._sending = 0.0  # of the latest burst

    def transfer(self, outgoing: Sequence[Tensor]) -> Tensor:
        send, receive = self._sender.send, self._receiver.receive
        finish = self._sender.finish if isinstance(self._sender, TorchSender) else None
        received: tuple[Tensor, ...] = ()
        sending, sends_first = 0.0, self._both_ways or self._rank == 0
        for number, tensor in enumerate(outgoing):
            received = ()  # its memory may be used again: torch has one buffer to receive into, too
            if not sends_first:
                received = receive(1, number)
            before = perf_counter()
            send(1, number, (tensor,))
            sending += perf_counter() - before
            if sends_first:
                received = receive(1, number)
            if finish is not None:
                finish()
        self._sending = sending
        return received[0]

    def run(self, outgoing: Sequence[Tensor]) -> tuple[float, Tensor | None]:
        begin = perf_counter()
        received = self.transfer(outgoing)
        synchronize(self._device)
        seconds = (perf_counter() - begin) / len(outgoing)
        self.send_seconds.append(self._sending / len(outgoing))
        return seconds if self._both_ways else seconds / 2, received


class Copies:
    """Copies on rank 0 while rank 1 waits: libc's, or the GPU's within its memory."""

    send_seconds: Sequence[float] = ()

    def __init__(self, rank: int, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._target = torch.empty(nbytes, dtype=torch.uint8, device=device) if rank == 0 else None

    def transfer(self, outgoing: Sequence[Tensor]) -> Tensor | None:
        if self._target is not None:
            for source in outgoing:
                if self._device.type == "cpu":
                    ctypes.memmove(self._target.data_ptr(), source.data_ptr(), source.nbytes)
                else:
                    self._target.copy_(source)
        return self._target

    def run(self, outgoing: Sequence[Tensor]) -> tuple[float, Tensor | None]:
        begin = perf_counter()
        received = self.transfer(outgoing)
        synchronize(self._device)
        return (perf_counter() - begin) / len(outgoing), received


class TorchSender:
    """The producer's end of an edge over torch.distributed. Gloo takes tensors by way of host memory."""

    def __init__(self, peer: int, staged: bool) -> None:
        self._peer, self._staged = peer, staged
        self._under_way: Any = None

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        self._under_way = dist.isend(tensors[0].cpu() if self._staged else tensors[0], self._peer)

    def finish(self) -> None:
        """The tensor may be written to again."""
        self._under_way.wait()


class TorchReceiver:
    """The consumer's end."""

    def __init__(self, peer: int, nbytes: int, device: torch.device, staged: bool) -> None:
        self._peer, self._device, self._staged = peer, device, staged
        self._buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu" if staged else device)

    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]:
        dist.recv(self._buffer, self._peer)
        return (self._received(),)

    def _received(self) -> Tensor:
        return self._buffer.to(self._device) if self._staged else self._buffer


class TorchExchange(TorchReceiver):
    """Both ends, where both ranks send at the same time. In one call, since NCCL does what goes between two ranks in
    order: a send that waits for the peer's receive would stand before the receive that the peer's send waits for."""

    def send(self, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        outgoing = tensors[0].cpu() if self._staged else tensors[0]
        both = [dist.P2POp(dist.isend, outgoing, self._peer), dist.P2POp(dist.irecv, self._buffer, self._peer)]
        self._under_way: Any = dist.batch_isend_irecv(both)

    def receive(self, step: int, microbatch: int) -> tuple[Tensor, ...]:
        for work in self._under_way:
            work.wait()
        return (self._received(),)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
