"""Ranks over shared memory, as ``pipex.launch`` has them, but ranks that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import persistent

import pipex
from pipex.errors import PeerFailed
from pipex.runtime import worlds
from pipex.transport.host import HostRun


def launch(fn: Callable[..., Any], ranks: int, *, args: Sequence[Any] = ()) -> list[Any]:
    """As ``pipex.launch``, of a function and results that can be pickled."""
    if ranks == 1:
        return pipex.launch(fn, 1, args=args)  # right here
    run = HostRun.create(ranks)
    try:
        found = persistent.ranks.outcomes([partial(_rank, run.address, rank, fn, args) for rank in range(ranks)])
    finally:
        run.close()
    for rank, outcome in enumerate(found):
        if "rank" not in outcome and "error" in outcome:  # it is no error about another rank
            raise PeerFailed(f"{outcome['error']}: {outcome['text']}", rank=rank)
    assert all("result" in outcome for outcome in found), found
    return [outcome["result"] for outcome in found]


def _rank(address: bytes, rank: int, fn: Callable[..., Any], args: Sequence[Any]) -> Any:
    return run_in(HostRun.open(address).join(rank, timeout=30.0), fn, args)


def run_in(world: Any, fn: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What a rank of this world returns."""
    worlds.enter(world)
    try:
        result = fn(*args)
        world.close()
    except BaseException as error:
        world.fail(error)
        raise
    finally:
        worlds.enter(None)
    return result
