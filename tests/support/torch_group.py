"""torch.distributed's default group, for a body that needs one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def in_group(store: Path, rank: int, ranks: int, body: Callable[..., Result], *arguments: object) -> Result:
    """What the body returns, run as this rank of a Gloo group, which is gone afterwards however the body ended."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    try:
        return body(*arguments)
    finally:
        dist.destroy_process_group()
