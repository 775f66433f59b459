"""Two ranks that send each other numbered messages through device rings on the simulated driver.

Sources are filled, and what arrived is checked, by simulated kernels on a compute stream; the host never looks at the
data. So an operation that comes too early shows as a wrong word, and one that never comes as a run that stalls.
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
from pipex.transport.header import Header
from pipex.transport.interface import TensorForm

CPU = 1  # DLPack's number: the simulator's memory is the host's
SCRIBBLE = 10**9


@dataclass
class Traffic:
    """What both ranks do.

    Attributes:
        words: of 8 bytes, per message.
        sources: how many source buffers a rank fills in turn.
        keep: most received tensors that a rank holds at once.
    """

    messages: int = 40
    words: int = 2048
    under_way: int = 2
    alive: int = 2
    sources: int = 3
    keep: int = 2
    both_ways: bool = True
    timeout: float = 20.0
    seed: int = 0
    settings: str = ""

    @property
    def form(self) -> TensorForm:
        return TensorForm((self.words,), torch.int64)

    def template(self, source: int) -> _native.TensorTemplate:
        header = Header(bytes(16), source, 1 - source, "activation", 0, 0, 0, 0, self.form)
        return _native.TensorTemplate(header.pack(), self.form.shape, 0, 64)


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
        size = (8 * traffic.words, traffic.under_way, traffic.alive)
        peer = 1 - rank
        self.sender = _native.DeviceRingSender(self.rank, peer, *size)
        self.receiver = _native.DeviceRingReceiver(self.rank, peer, *size)
        mine = self.receiver.address + self.receiver.offer + self.sender.offer
        theirs = self.member.exchange(mine)[peer]
        self.sender.connect(theirs[:32], theirs[32:112])
        self.receiver.connect(theirs[112:])
        self.member.exchange(b"")
        self.receiver.close_descriptor()
        self.sources = [self.simulator.allocate(8 * traffic.words) for _ in range(traffic.sources)]
        self.own = [self.simulator.allocate(8 * traffic.words) for _ in range(4)]
        self.kept: deque[torch.Tensor] = deque()
        self.random = random.Random(traffic.seed * 2 + rank)

    def send(self, message: int) -> None:
        traffic = self.traffic
        while self.rank.sent <= message - traffic.sources:
            self.control.raise_if_aborted()
            time.sleep(0.0002)
        source = self.sources[message % traffic.sources]
        self.simulator.fill(self.compute, source, traffic.words, self.tag(self.number, message))
        self.sender.send(traffic.template(self.number), source, self.compute, 1, message)

    def receive(self, message: int) -> None:
        traffic, peer = self.traffic, 1 - self.number
        template = traffic.template(peer)
        capsule = self.receiver.receive(template, self.compute, 1, message)
        if capsule is None:
            own = self.own[message % len(self.own)]
            self.receiver.receive_into(template, own, self.compute, 1, message)
            self.simulator.check(self.compute, own, traffic.words, self.tag(peer, message))
            return
        tensor = torch.from_dlpack(capsule)
        self.simulator.check(self.compute, tensor.data_ptr(), traffic.words, self.tag(peer, message))
        self.kept.append(tensor)
        del tensor, capsule
        while len(self.kept) > self.random.randint(0, traffic.keep):
            self.drop()

    def drop(self) -> None:
        """Gives the oldest tensor back, spoilt: whoever still reads the slot, or reads it too early, will see."""
        address = self.kept[0].data_ptr()
        self.simulator.fill(self.compute, address, self.traffic.words, SCRIBBLE)
        self.kept.popleft()

    def tag(self, sender: int, message: int) -> int:
        return 2 * message + sender

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
    """The whole life of one rank; what it returns is all zero if all went well."""
    end = End(library, control, rank, traffic)
    end.run()
    end.close()
    simulator = end.simulator
    return {"mismatches": simulator.mismatches, "violations": simulator.violations, "mappings": simulator.mappings}


WELL = {"mismatches": 0, "violations": [], "mappings": 0}
