"""What ranks tell each other outside the plan: JSON, all to all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipex.errors import ConfigMismatch
from pipex.transport.interface import World


def share(world: World, call: str, said: Any) -> list[Any]:
    """Collective: what every rank says (anything JSON can hold), in rank order.

    Args:
        call: what this rank is doing, such as ``"step"``.

    Raises:
        ConfigMismatch: another rank is doing something else, or has ended its run.
    """
    every = [json.loads(payload or '["the end of its run", null]') for payload in
             world.exchange(json.dumps([call, said]).encode())]  # fmt: skip
    for rank, (theirs, _) in enumerate(every):
        if theirs != call:
            raise ConfigMismatch(
                "the ranks disagree about the call",
                got=f"{call} on rank {world.rank}, {theirs} on rank {rank}", needed="the same order on every rank",
                fix="give all ranks the same number of batches, and let all of them save, load and evaluate",
            )  # fmt: skip
    return [value for _, value in every]


def agree(world: World, call: str, said: dict[str, Any]) -> dict[str, Any]:
    """Collective: the value of every key, where a rank that says None abstains.

    Raises:
        ConfigMismatch: two ranks say different things (shows both), or as ``share``.
    """
    return compare(share(world, call, said))


def compare(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``agree`` on what every rank has said already; the same on every rank."""
    agreed: dict[str, tuple[int, Any]] = {}
    for rank, theirs in enumerate(every):
        for key, value in theirs.items():
            if value is None:
                continue
            before = agreed.setdefault(key, (rank, value))
            if before[1] != value:
                raise ConfigMismatch(
                    f"the ranks disagree about {key}",
                    got=f"{before[1]} on rank {before[0]}, {value} on rank {rank}", needed="the same on every rank",
                    fix="start every rank with the same program and arguments",
                )  # fmt: skip
    return {key: value for key, (_, value) in agreed.items()}
