"""What all ranks must agree about before an edge is opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipex.errors import ConfigMismatch
from pipex.transport.interface import EdgeSpec, World


def exchange_offers(world: World, specs: Sequence[EdgeSpec], digest: bytes, offer: Any = None) -> list[Any]:
    """Collective: what every rank offers (anything JSON can hold), in rank order, once all have the same edges.

    Raises:
        ConfigMismatch: ranks gave different edges or digests.
    """
    config = [f"plan {digest.hex()}", *map(_describe, specs)]
    offers = [json.loads(payload) for payload in world.exchange(json.dumps([config, offer]).encode())]
    for rank, (theirs, _) in enumerate(offers):
        if theirs != config:
            raise _mismatch(world.rank, config, rank, theirs)
    return [offered for _, offered in offers]


def _describe(spec: EdgeSpec) -> str:
    return f"{spec}: {spec.slots} slots, {spec.alive} alive"


def _mismatch(rank: int, mine: list[str], other_rank: int, theirs: list[str]) -> ConfigMismatch:
    places = range(max(len(mine), len(theirs)))
    got, needed = next(
        (a, b) for a, b in ((_line(theirs, i), _line(mine, i)) for i in places) if a != b
    )  # fmt: skip
    return ConfigMismatch(
        f"rank {rank} and rank {other_rank} were started with different plans",
        got=f"on rank {other_rank}: {got}", needed=f"as on rank {rank}: {needed}",
        fix="give all ranks the same plan and model",
    )  # fmt: skip


def _line(lines: list[str], index: int) -> str:
    return lines[index] if index < len(lines) else "no such edge"
