"""What ranks tell each other outside the plan: JSON, all to all."""

from __future__ import annotations

import json
from typing import Any

from pipex.errors import ConfigMismatch
from pipex.transport.interface import World


def share(world: World, said: Any) -> list[Any]:
    """Collective: what every rank says (anything JSON can hold), in rank order.

    Raises:
        ConfigMismatch: a rank has ended its run meanwhile.
    """
    payloads = world.exchange(json.dumps(said).encode())
    if b"" in payloads:
        raise ConfigMismatch(
            "the ranks disagree about how many steps there are",
            got=f"rank {payloads.index(b'')} has ended its run, rank {world.rank} has not",
            needed="the same calls on every rank", fix="give all ranks the same number of batches",
        )  # fmt: skip
    return [json.loads(payload) for payload in payloads]


def agree(world: World, said: dict[str, Any]) -> dict[str, Any]:
    """Collective: the value of every key, where a rank that says None abstains.

    Raises:
        ConfigMismatch: two ranks say different things; shows both.
    """
    agreed: dict[str, tuple[int, Any]] = {}
    for rank, theirs in enumerate(share(world, said)):
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
