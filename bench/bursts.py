"""Bursts of messages between two ranks: their contents, their times, and whether they arrived whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipex.bench.p2p_ends import End, synchronize
from pipex.transport.interface import World

BURST_BYTES = 16 << 20  # of messages each way; a clock cannot see a small one alone
MAX_BURST = 64


class Bursts:
    """Of messages of ``nbytes`` by all providers. Both ranks call the same methods in the same order.

    Attributes:
        messages: how many a timed burst has.
        wrong: by provider, the bytes that this rank received wrong, of all messages that were compared.
    """

    def __init__(self, world: World, nbytes: int, ends: Mapping[str, End]) -> None:
        self.messages = max(2, min(MAX_BURST, BURST_BYTES // nbytes))
        self.wrong = dict.fromkeys(ends, 0)
        self._world = world
        self._ends = ends
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=world.device) for _ in range(2)]
        noise = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))
        self._noise = noise.to(world.device)
        self._next = 0

    def sample(self, provider: str) -> float:
        """Microseconds per message of one burst; of no meaning on rank 1."""
        outgoing = self.fill(self.messages)
        self.meet()
        seconds, received = self._ends[provider].run(outgoing)
        self._world.exchange(b"")  # nobody fills or compares while the other one is timed
        self.compare(provider, outgoing, received)
        return seconds * 1e6

    def fill(self, messages: int) -> list[Tensor]:
        """What the next burst sends: two buffers by turns, with new contents, the same on both ranks."""
        for buffer in self._buffers:
            fill(buffer, self._noise, self._next)
            self._next += 1
        synchronize(self._world.device)
        return [self._buffers[number % 2] for number in range(messages)]

    def meet(self) -> None:
        """Returns on both ranks within a microsecond."""
        self._world.exchange(b"")
        self._world.exchange(b"")  # the first may have found this rank asleep

    def compare(self, provider: str, outgoing: Sequence[Tensor], received: Tensor | None) -> None:
        """Compares the last message of a burst, if this rank received any, with the other rank's."""
        if received is not None and not torch.equal(received, outgoing[-1]):
            self.wrong[provider] += int(torch.count_nonzero(received != outgoing[-1]))


def fill(buffer: Tensor, noise: Tensor, number: int) -> None:
    """Content ``number``: no byte of it is the same in the 255 contents before and after."""
    torch.bitwise_xor(noise, number % 256, out=buffer)
