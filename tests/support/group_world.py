"""Ranks over torch.distributed's Gloo, as they are where hosts have no memory in common."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from forked import outcomes
from host_world import run_in
from torch.distributed import FileStore

from pipex.torch_internals import import_compiler
from pipex.transport.group import GroupWorld


def launch(fn: Callable[..., Any], ranks: int, *, args: Sequence[Any] = ()) -> list[Any]:
    """As ``pipex.launch``, through connections on the loopback address.

    By fresh ranks: in one that stays, Python's collector would free a Gloo group that a pipeline has held, and hangs
    now and then, as the group's thread needs the interpreter to end.
    """
    import_compiler()  # or the first optimizer of every rank would
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        found = outcomes([partial(_rank, store, rank, ranks, fn, args) for rank in range(ranks)], seconds=100)
    assert all("result" in outcome for outcome in found), found
    return [outcome["result"] for outcome in found]


def _rank(store: Path, rank: int, ranks: int, fn: Callable[..., Any], args: Sequence[Any]) -> Any:
    return run_in(GroupWorld(FileStore(str(store), ranks), rank, ranks, timeout=30.0), fn, args)
