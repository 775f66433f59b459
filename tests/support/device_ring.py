"""Two ranks that send each other numbered messages through device rings on the simulated driver.

Sources are filled, and what arrived is checked, by simulated kernels on a compute stream; the host never looks at the
data. So an operation that comes too early shows as a wrong word, and one that never comes as a run that stalls.

A message that the ring takes from host memory only is copied there and from there as torch does it: the host waits for
its compute stream.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from simulated_cuda import Simulator

from pipex import _native
from pipex.transport.header import Header, pack_table, read_table
from pipex.transport.interface import Form, TensorForm

CPU = 1  # DLPack's number: the simulator's memory is the host's
SCRIBBLE = 10**9


@dataclass
class Traffic:
    """What both ranks do.

    Attributes:
        words: of 8 bytes, per tensor at most.
        tensors: per message, at most.
        varied: whether messages have any number of tensors of any size, in the long run ever larger ones; else all have
            the most.
        sources: how many source buffers a rank fills in turn.
        keep: most received messages that a rank holds at once.
    """

    messages: int = 40
    words: int = 2048
    tensors: int = 1
    varied: bool = False
    under_way: int = 2
    alive: int = 2
    sources: int = 3
    keep: int = 2
    both_ways: bool = True
    timeout: float = 20.0
    seed: int = 0
    settings: str = ""

    def sizes(self, source: int, message: int) -> list[int]:
        """The words of each tensor; both ranks know them without asking each other."""
        if not self.varied:
            return [self.words] * self.tensors
        chance = random.Random(f"{self.seed} {source} {message}")
        most = self.words * (message + 1) // self.messages
        return [chance.randint(0, most) for _ in range(chance.randint(0, self.tensors))]


def edge(source: int) -> bytes:
    return Header(bytes(16), source, 1 - source, "activation", 0, 0, 0, 0, 0).pack()


def form_of(sizes: list[int]) -> Form:
    return tuple(TensorForm((words,), torch.int64, (1,)) for words in sizes)


class End:
    """One of the two ranks, connected."""

    def __init__(self, library: Path, control: _native.Control, rank: int, traffic: Traffic) -> None:
        os.environ["SIMULATED_CUDA"] = traffic.settings
        self.traffic, self.number, self.control = traffic, rank, control
        self.member = _native.Member(control, rank, traffic.timeout, False)
        self.rank = _native.DeviceRank(self.member, str(library), 0, CPU)
        self.simulator = Simulator(library)
        self.simulator.start()
        self.compute = self.simulator.stream()
        size = traffic.under_way, traffic.alive
        peer = 1 - rank
        self.sender = _native.DeviceRingSender(self.rank, peer, *size, edge(rank))
        self.receiver = _native.DeviceRingReceiver(self.rank, peer, *size, edge(peer))
        mine = self.receiver.address + self.receiver.offer + self.sender.offer
        theirs = self.member.exchange(mine)[peer]
        self.sender.connect(theirs[:32], theirs[32:112])
        self.receiver.connect(theirs[112:])
        self.member.exchange(b"")
        self.receiver.close_descriptor()
        room = 8 * traffic.words * traffic.tensors
        self.sources = [self.simulator.allocate(room) for _ in range(traffic.sources)]
        self.own = [self.simulator.allocate(room) for _ in range(4)]
        self.filled = [0] * traffic.sources  # by source: messages from device memory when it was last sent
        self.on_device = 0  # messages sent from there
        self.form: Form = ()  # of the last message received
        self.kept: deque[list[torch.Tensor]] = deque()
        self.random = random.Random(traffic.seed * 2 + rank)

    def send(self, message: int) -> None:
        traffic, place = self.traffic, message % self.traffic.sources
        while self.rank.sent < self.filled[place]:
            self.control.raise_if_aborted()
            time.sleep(0.0002)
        sizes = traffic.sizes(self.number, message)
        parts = self.parts(self.sources[place], sizes)
        for part, words, tag in zip(parts, sizes, self.tags(self.number, message), strict=False):
            self.simulator.fill(self.compute, part, words, tag)
        form = _native.MessageForm(*pack_table(form_of(sizes)))
        if self.sender.fits(form, 0):
            self.sender.send(form, parts, self.compute, 1, message)
            self.on_device += 1
            self.filled[place] = self.on_device
        else:
            self.simulator.synchronize(self.compute)
            self.sender.send_from_host(form, parts, 1, message)

    def receive(self, message: int) -> None:
        traffic, peer = self.traffic, 1 - self.number
        sizes, tags = traffic.sizes(peer, message), self.tags(peer, message)
        own = self.own[message % len(self.own)]
        seen, capsules = self.receiver.receive(self.compute, 1, message)
        if seen is not None:
            self.form, _ = read_table(seen[0])
        assert self.form == form_of(sizes)
        if capsules is None:
            parts = self.parts(own, sizes)
            self.receiver.receive_into(parts, self.compute, 1, message)
            self.check(parts, sizes, tags)
            return
        tensors = [torch.from_dlpack(capsule) for capsule in capsules]
        del capsules
        if any(tensor.numel() and not self.simulator.is_device(tensor.data_ptr()) for tensor in tensors):
            parts = self.parts(own, sizes)
            for part, tensor in zip(parts, tensors, strict=True):
                self.simulator.copy(part, tensor.data_ptr(), 8 * tensor.numel(), self.compute)
            self.simulator.synchronize(self.compute)
            self.check(parts, sizes, tags)
            return
        self.check([tensor.data_ptr() for tensor in tensors], sizes, tags)
        self.kept.append(tensors)
        del tensors
        while len(self.kept) > self.random.randint(0, traffic.keep):
            self.drop()

    def check(self, parts: list[int], sizes: list[int], tags: range) -> None:
        for part, words, tag in zip(parts, sizes, tags, strict=False):
            self.simulator.check(self.compute, part, words, tag)

    def drop(self) -> None:
        """Gives the oldest message back, spoilt: whoever still reads the slot, or reads it too early, will see."""
        for tensor in self.kept[0]:
            self.simulator.fill(self.compute, tensor.data_ptr(), tensor.numel(), SCRIBBLE)
            del tensor
        self.kept.popleft()

    def parts(self, buffer: int, sizes: list[int]) -> list[int]:
        """Where in a buffer each tensor of a message is."""
        return [buffer + 8 * self.traffic.words * place for place in range(len(sizes))]

    def tags(self, sender: int, message: int) -> range:
        """The numbers that the tensors of a message tell."""
        first = (2 * message + sender) * self.traffic.tensors
        return range(first, first + self.traffic.tensors)

    def run(self) -> None:
        for message in range(self.traffic.messages):
            self.member.at(1, message)
            if self.traffic.both_ways or self.number == 0:
                self.send(message)
            if self.traffic.both_ways or self.number == 1:
                self.receive(message)

    def close(self) -> None:
        while self.kept:
            self.drop()
        self.rank.flush()
        self.sender.close()
        self.receiver.close()
        self.member.exchange(b"")
        self.rank.free_retired()
        self.simulator.synchronize(self.compute)
        for pointer in self.sources + self.own:
            self.simulator.call("cuMemFree_v2", pointer)
        del self.sender, self.receiver
        self.rank.close()
        self.member.exchange(b"")
        self.member.leave()


def converse(library: Path, control: _native.Control, rank: int, traffic: Traffic) -> dict[str, Any]:
    """The whole life of one rank: what went wrong, all zero if nothing did, and how its messages went."""
    end = End(library, control, rank, traffic)
    end.run()
    grown, simulator = end.sender.grown, end.simulator
    end.close()
    return {
        "mismatches": simulator.mismatches, "violations": simulator.violations, "mappings": simulator.mappings,
        "grown": grown, "on device": end.on_device,
    }  # fmt: skip


WELL = {"mismatches": 0, "violations": [], "mappings": 0}
