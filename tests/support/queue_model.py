"""Ranks whose streams share hardware queues, running a plan's actions under the device ring's protocol.

A host enqueues what the executor's actions would (``rank_host``), and waits only where the protocol says so. A stream's
operations go into the hardware queue that the stream is mapped to, in the order in which they are enqueued; a queue
works on its first operation alone. Who goes on next, of the hosts and queues that can, is the scheduler's choice.

A message that does not fit goes through host memory: its sender's host waits for what computes it, its receiver's for
its own stream, which copies it. Then the receiver makes memory, and the sender maps it when it sends the next time;
each of their hosts waits for that on the stream that is also the abort's.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

from pipex.plan.actions import Action, Kind
from pipex.plan.causality import RECEIVES
from pipex.plan.communication import alive, slots_needed
from pipex.plan.placement import Edge
from pipex.plan.plan import Plan

COMPUTE, SEND, ABORT, RECEIVE = "compute", "send", "abort", "receive"
Stream = tuple[int, str]
"""(rank, name)"""

Token = tuple[object, ...]
"""Something that an operation makes true for ever: an event, or a flag's or credit's count."""


@dataclass(frozen=True)
class Operation:
    """Waits for a token, makes one true, or just takes its time."""

    rank: int
    wait: Token | None = None
    signal: Token | None = None
    frees: bool = False  # the abort rule: all flags and credits of its rank


Choice = tuple[str, int]
"""("host", rank) | ("queue", number)"""

HOST_MEMORY = 0
"""Instead of a slot's use, counted from 1: the message is not in device memory."""

Host = Generator[Callable[[], bool], None, None]
"""A program that yields what must hold before it goes on."""


@dataclass
class Device:
    """The hardware queues of all ranks.

    Args:
        queue_of: the queue of each stream.
        room: how many operations a queue takes; the host waits for room. None: any number.

    Attributes:
        early: the waits that were enqueued before what satisfies them.
    """

    queue_of: Mapping[Stream, int]
    room: int | None = None
    queues: dict[int, deque[Operation]] = field(default_factory=dict)
    true: set[Token] = field(default_factory=set)
    enqueued: set[Token] = field(default_factory=set)
    freed: set[int] = field(default_factory=set)
    early: list[Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queues = {queue: deque() for queue in sorted(set(self.queue_of.values()))}

    def enqueue(
        self, rank: int, stream: str, *, wait: Token | None = None, signal: Token | None = None, frees: bool = False
    ) -> Host:
        """Anybody may go on before the operation is enqueued."""
        queue, room = self.queues[self.queue_of[rank, stream]], self.room
        yield _now if room is None else lambda: len(queue) < room
        operation = Operation(rank, wait, signal, frees)
        if operation.signal is not None:
            self.enqueued.add(operation.signal)
        if operation.wait is not None and operation.wait not in self.enqueued:
            self.early.append(operation)
        queue.append(operation)

    def can_go(self, queue: int) -> bool:
        if not self.queues[queue]:
            return False
        first = self.queues[queue][0]
        return first.wait is None or first.wait in self.true or (first.wait[0] in REMOTE and first.rank in self.freed)

    def go(self, queue: int) -> None:
        operation = self.queues[queue].popleft()
        if operation.signal is not None:
            self.true.add(operation.signal)
        if operation.frees:
            self.freed.add(operation.rank)


def _now() -> bool:
    return True


REMOTE = ("written", "released")
"""Tokens that another process makes true."""


@dataclass
class EdgeState:
    """What the hosts know of a ring, as in csrc/host: free slots (the last that came back is taken), slots on their way
    to either side, and how many are lent."""

    slots: int
    alive: int
    stack: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    ready: deque[tuple[int, int]] = field(default_factory=deque)
    uses: dict[int, int] = field(default_factory=dict)
    lent: dict[int, tuple[int, int]] = field(default_factory=dict)  # by micro-batch
    kept: deque[tuple[int, int]] = field(default_factory=deque)  # used, but still referred to
    sent: int = 0
    from_device: set[int] = field(default_factory=set)  # messages
    offered: int = 0  # generations of memory
    mapped: int = 0

    def __post_init__(self) -> None:
        self.stack = list(range(self.slots))[::-1]
        self.uses = dict.fromkeys(range(self.slots), 0)


Grows = Callable[[Edge, int], bool]


class Ended(Exception):
    """The named error that a host raises after an abort."""


class Run:
    """One step of a plan.

    Args:
        orders: per rank its actions, with sends and receives.
        keeps: how many tensors of each edge somebody still holds after their last use.
        grows: which messages of an edge, by number, go through host memory.
        early_announcement: the broken rule: a slot is pushed before its operations are enqueued.
        growth_in_step: the broken rule: a receiver waits until the sender has mapped what it has made.
    """

    def __init__(
        self, plan: Plan, device: Device, orders: Sequence[Sequence[Action]], *, keeps: int = 0,
        grows: Grows = lambda edge, message: False, early_announcement: bool = False, growth_in_step: bool = False,
    ) -> None:  # fmt: skip
        self.plan, self.device, self.orders, self.keeps, self.grows = plan, device, orders, keeps, grows
        self.early_announcement, self.growth_in_step = early_announcement, growth_in_step
        slots, held = slots_needed(plan), alive(plan)
        self.edges = {
            edge: EdgeState(max(1, slots[edge]) + max(1, held[edge]), max(1, held[edge])) for edge in plan.edges
        }
        self.forward_only = not any(a.kind in (Kind.I, Kind.B) for order in orders for a in order)
        self.aborted = False
        self.hosts: dict[int, Host] = {rank: self._host(rank) for rank in range(len(orders))}
        self.waits: dict[int, Callable[[], bool]] = dict.fromkeys(self.hosts, _now)
        self.at_end: set[int] = set()
        self.errors: set[int] = set()

    def runnable(self) -> list[Choice]:
        """The hosts and queues that can go on."""
        hosts = [("host", rank) for rank in self.hosts if self.waits[rank]()]
        return hosts + [("queue", queue) for queue in self.device.queues if self.device.can_go(queue)]

    def go(self, who: str, which: int) -> None:
        if who == "queue":
            self.device.go(which)
            return
        try:
            self.waits[which] = next(self.hosts[which])
        except StopIteration:
            del self.hosts[which]
        except Ended:
            self.errors.add(which)
            del self.hosts[which]

    def stuck(self) -> list[str]:
        """Who has not come to the end, once nobody can go on."""
        queues = [f"queue {queue} at {waiting[0]}" for queue, waiting in self.device.queues.items() if waiting]
        return queues + [f"the host of rank {rank}" for rank in self.hosts]

    def kill(self, rank: int, *, by_stream: bool) -> None:
        """The rank's process and its queues are gone. The survivors see it and free their own flags and credits: by a
        write on their abort stream, or by one that needs no queue."""
        self.hosts.pop(rank, None)
        self.at_end.discard(rank)
        for waiting in self.device.queues.values():
            kept = [operation for operation in waiting if operation.rank != rank]
            waiting.clear()
            waiting.extend(kept)
        self.aborted = True
        for other in range(len(self.orders)):
            if other == rank:
                continue
            if by_stream:
                abort = self.device.queues[self.device.queue_of[other, ABORT]]
                abort.append(Operation(other, frees=True))
            else:
                self.device.freed.add(other)

    # A rank's program.

    def _host(self, rank: int) -> Host:
        for action in self.orders[rank]:
            yield from self._act(rank, action)
        mine = [edge for edge in self.edges if self.plan.placement.rank_of(edge.source) == rank]
        sources = {("free", edge, message) for edge in mine for message in self.edges[edge].from_device}
        yield from self._until(lambda: sources <= self.device.true)  # flush
        self.at_end.add(rank)
        yield from self._until(self.agreed)

    def agreed(self) -> bool:
        """Whether all ranks have come to the end of the step: from here on nobody's death is a failure."""
        return len(self.at_end) == len(self.orders)

    def _act(self, rank: int, action: Action) -> Host:
        stage, kind, microbatch, _ = action
        if kind in (Kind.SEND_F, Kind.SEND_B):
            yield from self._send(rank, self.plan.placement.ends[stage, kind], microbatch)
        elif kind in (Kind.F, Kind.I, Kind.B, Kind.W):
            if kind is Kind.F:
                yield from self._receive(rank, Edge(stage - 1, stage, "activation"), microbatch)
            elif kind is not Kind.W:
                yield from self._receive(rank, Edge(stage + 1, stage, "gradient"), microbatch)
            yield from self.device.enqueue(rank, COMPUTE)
            if kind in (Kind.W, Kind.B) or self.forward_only:
                for edge in (Edge(stage - 1, stage, "activation"), Edge(stage + 1, stage, "gradient")):
                    if edge in self.edges and microbatch in self.edges[edge].lent:
                        yield from self._drop(rank, edge, microbatch)

    def _send(self, rank: int, edge: Edge, microbatch: int) -> Host:
        device, ring = self.device, self.edges[edge]
        message, ring.sent = ring.sent, ring.sent + 1
        if ring.mapped < ring.offered:
            yield from self._done(rank, ABORT, ("mapped", edge, ring.offered))
            ring.mapped = ring.offered
        through_host = self.grows(edge, message)
        if through_host:
            yield from self._done(rank, COMPUTE, ("computed", edge, message))
        yield from self._until(lambda: bool(ring.stack or ring.free))
        ring.stack += ring.free
        ring.free.clear()
        slot = ring.stack.pop()
        if through_host:
            ring.ready.append((slot, HOST_MEMORY))
            return
        ring.from_device.add(message)
        ring.uses[slot] = use = ring.uses[slot] + 1
        if self.early_announcement:
            ring.ready.append((slot, use))
        yield from device.enqueue(rank, COMPUTE, signal=("computed", edge, message))
        yield from device.enqueue(rank, SEND, wait=("computed", edge, message))
        if use > 1:
            yield from device.enqueue(rank, SEND, wait=("released", edge, slot, use - 1))
        yield from device.enqueue(rank, SEND)  # the copy
        yield from device.enqueue(rank, SEND, signal=("written", edge, slot, use))
        yield from device.enqueue(rank, SEND, signal=("free", edge, message))
        if not self.early_announcement:
            ring.ready.append((slot, use))

    def _receive(self, rank: int, edge: Edge, microbatch: int) -> Host:
        if edge not in self.edges:
            return
        ring = self.edges[edge]
        yield from self._until(lambda: bool(ring.ready))
        slot, use = ring.ready.popleft()
        if use == HOST_MEMORY:
            if ring.mapped == ring.offered:
                yield from self._done(rank, ABORT, ("made", edge, ring.offered + 1))
                ring.offered += 1
            if self.growth_in_step:
                yield from self._until(lambda: ring.mapped == ring.offered)
            yield from self._done(rank, COMPUTE, ("arrived", edge, microbatch))
            ring.free.append(slot)
            return
        yield from self.device.enqueue(rank, COMPUTE, wait=("written", edge, slot, use))
        if len(ring.lent) + len(ring.kept) < ring.alive:
            ring.lent[microbatch] = slot, use
        else:
            yield from self.device.enqueue(rank, COMPUTE)  # copies it out
            yield from self._give_back(rank, edge, slot, use)

    def _drop(self, rank: int, edge: Edge, microbatch: int) -> Host:
        ring = self.edges[edge]
        ring.kept.append(ring.lent.pop(microbatch))
        if len(ring.kept) > self.keeps:
            yield from self._give_back(rank, edge, *ring.kept.popleft())

    def _give_back(self, rank: int, edge: Edge, slot: int, use: int) -> Host:
        yield from self.device.enqueue(rank, COMPUTE, signal=("released", edge, slot, use))
        self.edges[edge].free.append(slot)

    def _done(self, rank: int, stream: str, token: Token) -> Host:
        """The host is in a call of the driver until the stream has come so far; an abort alone does not end it."""
        yield from self.device.enqueue(rank, stream, signal=token)
        yield lambda: token in self.device.true
        if self.aborted:
            raise Ended

    def _until(self, holds: Callable[[], bool]) -> Host:
        if holds():
            return
        yield lambda: holds() or self.aborted
        if not holds():
            raise Ended


class EarlyReceives(Run):
    """The same actions with as many slots as messages, and receives whose waits stand on a stream of their own, in the
    queue before the peer has enqueued what satisfies them: ``ahead`` more of them than the rank has used."""

    def __init__(self, plan: Plan, device: Device, orders: Sequence[Sequence[Action]], *, ahead: int) -> None:
        self.ahead = ahead
        self.unposted = [deque(action for action in order if action.kind in RECEIVES) for order in orders]
        super().__init__(plan, device, orders)

    def _host(self, rank: int) -> Host:
        for _ in range(self.ahead):
            yield from self._post(rank)
        yield from super()._host(rank)

    def _post(self, rank: int) -> Host:
        if self.unposted[rank]:
            action = self.unposted[rank].popleft()
            message = (self.plan.placement.ends[action.stage, action.kind], action.microbatch)
            yield from self.device.enqueue(rank, RECEIVE, wait=("written", *message))
            yield from self.device.enqueue(rank, RECEIVE, signal=("arrived", *message))

    def _receive(self, rank: int, edge: Edge, microbatch: int) -> Host:
        if edge in self.edges:
            yield from self._post(rank)
            yield from self.device.enqueue(rank, COMPUTE, wait=("arrived", edge, microbatch))

    def _send(self, rank: int, edge: Edge, microbatch: int) -> Host:
        yield from self.device.enqueue(rank, COMPUTE, signal=("computed", edge, microbatch))
        yield from self.device.enqueue(rank, SEND, wait=("computed", edge, microbatch))
        yield from self.device.enqueue(rank, SEND)  # the copy
        yield from self.device.enqueue(rank, SEND, signal=("written", edge, microbatch))


# Who goes on next, of several that can.

Scheduler = Callable[[list[Choice]], Choice]


def extremes() -> dict[str, Scheduler]:
    """Hosts come before queues in the choices, low ranks before high ones."""

    def queues_first(choices: list[Choice]) -> Choice:
        return next((choice for choice in choices if choice[0] == "queue"), choices[0])

    def hosts_from_the_last(choices: list[Choice]) -> Choice:
        return next((choice for choice in reversed(choices) if choice[0] == "host"), choices[-1])

    return {
        "hosts first, the first rank before all": lambda choices: choices[0],
        "hosts first, the last rank before all": hosts_from_the_last,
        "queues first": queues_first,
        "queues first, the last before all": lambda choices: choices[-1],
    }


def by_chance(seed: int) -> Scheduler:
    return random.Random(seed).choice


def finish(run: Run, scheduler: Scheduler, moves: int | None = None) -> None:
    """Until nobody can go on, or for so many moves."""
    while (moves is None or moves > 0) and (choices := run.runnable()):
        run.go(*scheduler(choices))
        moves = None if moves is None else moves - 1


# Which streams share a queue.


def by_creation(ranks: int, streams: Sequence[str], queues: int) -> dict[Stream, int]:
    """Each process has its own queues, which its streams take in turn."""
    return {(rank, s): rank * queues + i % queues for rank in range(ranks) for i, s in enumerate(streams)}


def one_device(ranks: int, streams: Sequence[str], queues: int) -> dict[Stream, int]:
    """All processes' streams share the queues."""
    names = [(rank, stream) for rank in range(ranks) for stream in streams]
    return {name: i % queues for i, name in enumerate(names)}


def assigned(ranks: int, streams: Sequence[str], classes: Sequence[int]) -> dict[Stream, int]:
    """Any assignment, the same in each process."""
    most = max(classes) + 1
    return {(rank, s): rank * most + c for rank in range(ranks) for s, c in zip(streams, classes, strict=True)}
