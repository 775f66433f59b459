"""Joining, exchanging bytes and leaving."""

from __future__ import annotations

import os
import socket
import struct
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipex.errors import InputError, PipexError
from pipex.transport.group import GroupWorld
from pipex.transport.interface import EdgeSpec


def payload(rank: int, turn: int) -> bytes:
    """Of unequal lengths, empty and longer than a socket's buffer among them."""
    return bytes([rank + 1]) * ((rank + turn) % 4 * 700_001)


def test_exchange_gathers_unequal_lengths_in_rank_order(run: Callable[..., list[Any]]) -> None:
    def body(world: GroupWorld) -> list[list[bytes]]:
        return [world.exchange(payload(world.rank, turn)) for turn in range(5)]

    expected = [[payload(rank, turn) for rank in range(4)] for turn in range(5)]
    assert run(body, 4) == [expected] * 4


def test_a_world_of_one_rank_exchanges_with_itself(run: Callable[..., list[Any]]) -> None:
    assert run(lambda world: world.exchange(b"alone"), 1) == [[b"alone"]]


def test_ranks_of_one_host_listen_on_the_loopback_address_only(run: Callable[..., list[Any]]) -> None:
    def body(world: GroupWorld) -> list[str]:
        links = {os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)}
        addresses = []
        for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A" and f"socket:[{rest[5]}]" in links:  # LISTEN, and one of ours
                    addresses.append(socket.inet_ntoa(struct.pack("=I", int(local.split(":")[0], 16))))
        world.exchange(b"")
        return addresses

    for addresses in run(body, 2):
        assert addresses
        assert set(addresses) == {"127.0.0.1"}


def test_closing_leaves_no_thread_no_descriptor_and_no_default_group(tmp_path: Path, run: Callable[..., Any]) -> None:
    like = [torch.zeros(10)]
    spec = EdgeSpec(0, 1, "activation", 0, 1, 2, 1)

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def body(outer: GroupWorld) -> list[tuple[int, int]]:
        seen, kept = [], []
        for turn in range(4):
            world = GroupWorld(dist.FileStore(str(tmp_path / f"inner{turn}"), 2), outer.rank, 2, timeout=30.0)
            links = world.open([spec], bytes(16))
            kept.append(links)
            if world.rank == 0:
                links.senders[0, 1, "activation"].send(1, 0, like)
            else:
                links.receivers[0, 1, "activation"].receive(1, 0)
            links.flush()
            world.close()
            world.close()
            deadline = time.monotonic() + 2
            while seen and counts() > seen[0] and time.monotonic() < deadline:
                os.sched_yield()  # the kernel lists a thread for a moment after it was joined
            seen.append(counts())
        assert not dist.is_initialized()
        return seen

    for seen in run(body, 2):
        assert seen == [seen[0]] * 4


@pytest.mark.parametrize("how", ["close", "fail"])
def test_a_rank_that_has_left_holds_no_group_and_no_store(
    tmp_path: Path, run: Callable[..., list[Any]], how: str
) -> None:
    """Whoever still holds its world and edges. The last rank that lets go of a FileStore removes its file."""
    path = tmp_path / "inner"

    def body(outer: GroupWorld) -> None:
        world = GroupWorld(dist.FileStore(str(path), 2), outer.rank, 2, timeout=30.0)
        links = world.open([EdgeSpec(0, 1, "activation", 0, 1, 2, 1)], bytes(16))
        ends = [*links.senders.values(), *links.receivers.values()]
        if outer.rank == 0:
            links.senders[0, 1, "activation"].send(1, 0, [torch.zeros(10)])  # which nobody receives
        group = weakref.ref(world._group)
        outer.exchange(b"")
        assert path.exists()
        if how == "close":
            world.close()
        else:
            world.fail(ValueError("not a number"))
        assert group() is None
        outer.exchange(b"")
        deadline = time.monotonic() + 10
        while path.exists() and time.monotonic() < deadline:  # a thread of the watch may be the last to let go
            time.sleep(0.01)
        assert not path.exists()
        for end in ends:
            with pytest.raises(PipexError, match="the world is closed" if how == "close" else "not a number"):
                end.send(1, 1, [torch.zeros(10)]) if outer.rank == 0 else end.receive(1, 1)

    run(body, 2)


def test_four_ranks_leave_together_however_they_are_scheduled(run: Callable[..., list[Any]], tmp_path: Path) -> None:
    def body(outer: GroupWorld) -> None:
        for turn in range(30):
            world = GroupWorld(dist.FileStore(str(tmp_path / f"inner{turn}"), 4), outer.rank, 4, timeout=30.0)
            world.close()

    run(body, 4)


def test_too_much_to_exchange_is_refused(run: Callable[..., list[Any]]) -> None:
    def body(world: GroupWorld) -> None:
        with pytest.raises(InputError, match="got 67108865 bytes; needed at most 67108864"):
            world.exchange(bytes((64 << 20) + 1))

    run(body, 1)


def test_nccl_is_refused_for_tensors_in_cpu_memory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got device cpu"):
        GroupWorld(dist.FileStore(str(tmp_path / "store"), 1), 0, 1, backend="nccl")
