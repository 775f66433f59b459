"""torch.distributed's default group for the ranks that ``pipex.launch`` started: Gloo on loopback, or NCCL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from pipex.transport.interface import World


@contextmanager
def joined(world: World, backend: str = "gloo") -> Iterator[str]:
    """Collective: inside, the ranks of ``world`` are torch.distributed's default group.

    Its store is a file in anonymous memory of rank 0, so that no port is opened for it and no file can stay behind.
    Gives the file's path.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    descriptor = os.memfd_create("pipex-bench-store") if world.rank == 0 else None
    path = world.exchange(f"/proc/{os.getpid()}/fd/{descriptor}".encode())[0].decode()
    store = dist.FileStore(path, world.ranks)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.ranks)
    try:
        yield path
        world.exchange(b"")  # nobody is in a transfer any more
    finally:
        dist.destroy_process_group()
    del store  # its end still writes to the file
    world.exchange(b"")
    if descriptor is not None:
        os.close(descriptor)
