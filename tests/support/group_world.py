"""Ranks over torch.distributed's Gloo, as they are where hosts have no memory in common."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import persistent
from host_world import run_in
from torch.distributed import FileStore

from pipex.transport.group import GroupWorld


def launch(fn: Callable[..., Any], ranks: int, *, args: Sequence[Any] = ()) -> list[Any]:
    """As ``pipex.launch``, through connections on the loopback address, by ranks that stay."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        return persistent.ranks.results([partial(_rank, store, rank, ranks, fn, args) for rank in range(ranks)])


def _rank(store: Path, rank: int, ranks: int, fn: Callable[..., Any], args: Sequence[Any]) -> Any:
    return run_in(GroupWorld(FileStore(str(store), ranks), rank, ranks, timeout=30.0), fn, args)
