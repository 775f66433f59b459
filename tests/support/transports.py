"""Forked ranks of one world over any transport, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked import Forked
from host_world import run_in
from torch.distributed import FileStore

from pipex.runtime import worlds
from pipex.transport import device
from pipex.transport.group import GroupWorld
from pipex.transport.host import HostRun

TRANSPORTS = ("host", "device", "group")
Body = Callable[[Any], Any] | None
"""Gets the world; None for a rank that never joins."""


@contextmanager
def start(
    transport: str, bodies: Sequence[Body], folder: Path, library: Path, timeout: float = 30.0
) -> Iterator[Forked]:
    """Ranks with a body each. ``library`` simulates the CUDA driver of the device transport."""
    run, store, ranks = HostRun.create(len(bodies)), str(folder / "store"), len(bodies)

    def join(rank: int) -> Any:
        if transport == "host":
            return run.join(rank, timeout=timeout)
        if transport == "device":
            return device.join(run, rank, torch.device("cpu"), timeout=timeout, library=str(library))
        return GroupWorld(FileStore(store, ranks), rank, ranks, timeout=timeout)

    def rank_main(rank: int, body: Body) -> Any:
        if body is None:
            return None
        worlds.set_threads(ranks)
        world = join(rank)
        try:
            return run_in(world, body, (world,))
        except BaseException:
            world.close()
            raise

    with Forked([partial(rank_main, rank, body) for rank, body in enumerate(bodies)]) as forked:
        yield forked
    run.close()
