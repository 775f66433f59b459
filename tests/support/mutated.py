"""Random changes of a JSON value: what a damaged or hostile file may hold where its reader expects something else."""

from __future__ import annotations

import copy
import random
from typing import Any

JUNK: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**70, 1.5, 1e308, 1e-320, float("nan"), float("inf"), "", "x", "x" * 5000, "a\0b",
    "\ud800", [], [1], [[]], {}, {"a": 1},
]  # fmt: skip


def mutate(rng: random.Random, value: Any, junk: list[Any]) -> None:
    """Changes a few places inside of a list or dict: other values (of ``JUNK`` and ``junk``), values of other places,
    keys renamed, parts left out or repeated, numbers a little off, brackets in brackets."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        everywhere = _places(value)
        if not everywhere:
            return
        container, key = rng.choice(everywhere)
        other, there = rng.choice(everywhere)
        match rng.randrange(6):
            case 0:
                container[key] = _nested(rng) if rng.random() < 0.1 else rng.choice(JUNK + junk)
            case 1:
                del container[key]
            case 2:
                container[key] = copy.deepcopy(other[there])
            case 3 if isinstance(container, dict):
                container[rng.choice([there, "", "x"])] = container.pop(key)
            case 4 if isinstance(container, list):
                container += copy.deepcopy(container[key:]) * rng.choice((1, 3))
            case _ if isinstance(container[key], (int, float)):
                container[key] += rng.choice((-1, 1, 0.5, 1 << 32))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key)."""
    found: list[tuple[Any, Any]] = []
    containers = [value]
    while containers:
        inner = containers.pop()
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        found += [(inner, key) for key in keys]
        containers += [inner[key] for key in keys]
    return found


def _nested(rng: random.Random) -> Any:
    value: Any = []
    for level in range(rng.choice((3, 90, 200, 300))):
        value = [value] if level % 2 else {"a": value}
    return value
