"""The ranks of a run, joined by torch.distributed's backends.

Control messages (headers, all-gathers, the lifeline) go through one Gloo group of all ranks. With Gloo the tensors go
through it too, every edge under tags of its own: Gloo moves a message only when its receive is posted, so no edge can
block another. (Measured: a group for each edge is not faster, at 4 KiB to 32 MiB on crossing edges, and costs a
connection and a thread each.) NCCL knows no tags and runs the operations of a communicator in order, so there every
edge gets a communicator of its own.

The groups are made from the backends' own classes: torch.distributed's default group, which belongs to the user, is
neither needed nor touched, and nothing that travels is pickled.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from pipex.errors import InputError, NativeUnavailable, PeerError, PipexError
from pipex.torch_internals import gloo_options, nccl_options
from pipex.transport.group.edges import Group, GroupLinks, GroupReceiver, GroupSender, Lane
from pipex.transport.group.watch import EVERYBODY, FOREVER, STORE_SECONDS, Watch, joined_key
from pipex.transport.interface import EdgeSpec, Orders, Phase
from pipex.transport.opening import exchange_offers

CPU = torch.device("cpu")
LENGTH = struct.Struct("<Q")
MAX_EXCHANGE = 64 << 20  # bytes, as between the ranks of a host; bounds what a corrupt length makes a rank allocate
LIFELINE_TAG, ABORT_TAG, LENGTH_TAG, PAYLOAD_TAG, FIRST_EDGE_TAG = range(5)
LOOK_SECONDS = 0.01  # between two looks at the store while ranks join


class GroupWorld:
    """The ranks of a run on any hosts. Collective: returns when all ranks have joined.

    A process that dies before it has joined is noticed after ``timeout`` only; afterwards at once.

    Args:
        store: a store that all ranks reach; wrap it in a ``PrefixStore`` of your own, since it serves one world.
        rank, ranks: this process and their number.
        backend: what the tensors go through. Gloo takes them from any device, by way of CPU memory.
        device: where this rank's tensors live.
        timeout: seconds that a rank may wait for another before the one that holds it up is named.

    Raises:
        InputError: the arguments do not fit each other.
        NativeUnavailable: NCCL is asked for and this torch has none.
        PeerError: another rank failed meanwhile, or did not join within ``timeout``.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        *,
        backend: Literal["gloo", "nccl"] = "gloo",
        device: torch.device = CPU,
        timeout: float = 300.0,
    ) -> None:
        if backend == "nccl":
            if device.type != "cuda":
                raise InputError("NCCL moves GPU memory only", got=f"device {device}", fix='use backend="gloo"')
            if not dist.is_nccl_available():
                raise NativeUnavailable(f"torch {torch.__version__} was built without NCCL", fix='use backend="gloo"')
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.rank, self.ranks, self.device = rank, ranks, device
        self._store: Store | None = store  # None after the end
        self._timeout = timeout
        self._staging = device if backend == "nccl" else CPU
        self._group: Group | None = None  # None before all ranks have joined, and after the end
        self._edge_groups: list[Group] = []
        self._links: list[GroupLinks] = []
        self._next_tag = FIRST_EDGE_TAG
        self._left = False
        self._watch = Watch(self, store.clone(), timeout, self._abort)  # type: ignore[attr-defined]
        try:
            with self._watch.waiting(EVERYBODY, "all ranks to join"):
                self._group = self._join()
                if ranks > 1:
                    self._watch.hold(self._group.recv([_bytes_of(bytearray(1))], (rank + 1) % ranks, LIFELINE_TAG))
        except BaseException as error:
            self.fail(error)
            raise

    def exchange(self, payload: bytes) -> list[bytes]:
        # Point to point rather than a collective, so that a rank knows, and can say, which other it waits for.
        if len(payload) > MAX_EXCHANGE:
            raise InputError("a payload between ranks is too long", got=f"{len(payload)} bytes",
                             needed=f"at most {MAX_EXCHANGE}")  # fmt: skip
        group, subject = self._joined(), "an exchange among all ranks"
        parts = [bytearray(payload) if rank == self.rank else bytearray() for rank in range(self.ranks)]
        peers = [rank for rank in range(self.ranks) if rank != self.rank]
        sent = []
        for peer in peers:
            with self._watch.waiting(peer, subject):
                sent.append((peer, group.send([_bytes_of(bytearray(LENGTH.pack(len(payload))))], peer, LENGTH_TAG)))
                if payload:
                    sent.append((peer, group.send([_bytes_of(parts[self.rank])], peer, PAYLOAD_TAG)))
        lengths = []
        for peer in peers:
            length_bytes = bytearray(LENGTH.size)
            with self._watch.waiting(peer, subject):
                lengths.append((peer, length_bytes, group.recv([_bytes_of(length_bytes)], peer, LENGTH_TAG)))
        for peer, length_bytes, arrival in lengths:
            with self._watch.waiting(peer, subject):
                arrival.wait()
            (length,) = LENGTH.unpack(length_bytes)
            if length > MAX_EXCHANGE:
                raise PipexError(f"rank {peer} announced too much", got=f"{length} bytes", needed=f"≤ {MAX_EXCHANGE}")
            if length:
                parts[peer] = bytearray(length)
                with self._watch.waiting(peer, subject):
                    group.recv([_bytes_of(parts[peer])], peer, PAYLOAD_TAG).wait()
        for peer, work in sent:
            with self._watch.waiting(peer, subject):
                work.wait()
        return [bytes(part) for part in parts]

    def at(self, step: int, position: int) -> None:
        self._watch.place = (step, position)

    def open(self, specs: Sequence[EdgeSpec], digest: bytes, orders: Orders = ()) -> GroupLinks:
        first_position = self._watch.places.add(digest, orders)
        exchange_offers(self, specs, digest)
        group = self._joined()
        links = GroupLinks(first_position)
        self._links.append(links)
        for spec in specs:
            tag, self._next_tag = self._next_tag, self._next_tag + Lane.TAGS
            if self.rank == spec.source_rank:
                links.add(spec, GroupSender(spec, digest, self._lane(group, spec, tag), self._watch))
            elif self.rank == spec.destination_rank:
                links.add(spec, GroupReceiver(spec, digest, self._lane(group, spec, tag), self._watch))
        return links

    def fail(self, error: BaseException) -> None:
        if self._left:
            return
        with suppress(Exception):
            if not isinstance(error, PeerError):
                self._watch.report_failure(error)
        self._leave()

    def close(self) -> None:
        if self._left:
            return
        self.at(self._watch.place[0], Phase.CLOSING)
        try:
            self.exchange(b"")  # from here on nobody has a tensor under way
            if self.ranks > 1:
                before = (self.rank - 1) % self.ranks
                with self._watch.waiting(before, "its end of the lifeline"):
                    self._joined().send([_bytes_of(bytearray(1))], before, LIFELINE_TAG).wait()
                self._watch.wait_for_goodbye()
            self._watch.end()
            self.exchange(b"")  # from here on nobody needs the store, which rank 0 may take along
        except BaseException as error:
            self.fail(error)
            raise
        self._leave()

    def _join(self) -> Group:
        store, rank, ranks = self._store, self.rank, self.ranks
        assert store is not None
        store.set(joined_key(rank), _host_identity())
        hosts = [joined_key(rank) for rank in range(ranks)]
        while not store.check(hosts):
            self._watch.check()
            time.sleep(LOOK_SECONDS)
        one_host = len({store.get(host) for host in hosts}) == 1

        # One thread: they serve collectives, and there are none. Gloo's own limit is only for the case that the watch
        # cannot speak, because the store's host is stopped.
        limit = timedelta(seconds=2 * self._timeout + STORE_SECONDS)
        options = gloo_options(_gloo_device(one_host), threads=1, timeout=limit)
        return cast(Group, ProcessGroupGloo(PrefixStore("gloo", store), rank, ranks, options))

    def _joined(self) -> Group:
        self._watch.check()
        if self._group is None:
            raise PipexError("the world is closed")
        return self._group

    def _lane(self, control: Group, spec: EdgeSpec, tag: int) -> Lane:
        sends = self.rank == spec.source_rank
        peer = spec.destination_rank if sends else spec.source_rank
        if self._staging == CPU:
            return Lane(control, peer, tag, control, peer, CPU, self.device)
        assert self._store is not None
        group = _nccl_group(PrefixStore(f"edge/{tag}", self._store), 0 if sends else 1, self.device)
        self._edge_groups.append(group)
        return Lane(control, peer, tag, group, 1 if sends else 0, self._staging, self.device)

    def _abort(self) -> None:
        """Breaks all connections of this rank; peers notice at once. From any thread."""
        if self._group is not None:
            # Gloo has no abort, but it closes all connections of a group when one wait in it times out.
            with suppress(RuntimeError):
                self._group.recv_anysource([_bytes_of(bytearray(1))], ABORT_TAG).wait(timedelta(milliseconds=1))
        for group in self._edge_groups:
            with suppress(RuntimeError):
                group.abort()

    def _leave(self) -> None:
        self._left = True
        self._abort()
        self._watch.end()
        for links in self._links:
            links.close()
        # Whoever still holds the world or its links holds no group and no store: freed at some later time, by Python's
        # collector, a FileStore can wait five minutes for its file, whose folder is just being removed.
        self._edge_groups.clear()
        self._group = self._store = None


def _bytes_of(memory: bytearray) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)


def _host_identity() -> str:
    """Equal for processes that reach each other on the loopback address: one boot, one network namespace."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/net")


def _gloo_device(one_host: bool) -> ProcessGroupGloo.Device:
    interface = os.environ.get("GLOO_SOCKET_IFNAME")  # as everywhere in torch
    if one_host:
        return ProcessGroupGloo.create_device(hostname="127.0.0.1")
    if interface:
        return ProcessGroupGloo.create_device(interface=interface)
    return ProcessGroupGloo.create_default_device()


def _nccl_group(store: Store, rank: int, device: torch.device) -> Group:
    """A communicator of two ranks, connected at once: one made at first use could wait for a peer that is elsewhere."""
    # The watch says who holds up a wait; NCCL's own watchdog would only end the process.
    options = nccl_options(timeout=FOREVER)
    group = dist.ProcessGroupNCCL(store, rank, 2, options)
    group.eager_connect_single_device(device)
    return cast(Group, group)
