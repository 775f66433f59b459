"""Rules of the list scheduler, varied: where the search goes from the portfolio."""

from __future__ import annotations

import random
from typing import NamedTuple

from pipex.plan.list_scheduler import Rule

_POOL = 6
"""Few enough that the best get most of the tries, enough that one rule's neighbours are not all there is."""

_STEPS = (30, 100, 300)
_SIGNED = {"input_lead", "weight_delay", "weight_skew"}
_AT_MOST = {"overrun": 1000}


class Tried(NamedTuple):
    """A rule, and what it gave: ``value`` is the time to be made small."""

    value: int
    rule: Rule
    medians: bool
    """whether it planned with the medians of the times, to be replayed on the true ones"""


class Pool:
    """The best rules for one placement."""

    def __init__(self) -> None:
        self.best: list[Tried] = []
        self._seen: set[tuple[Rule, bool]] = set()

    def is_new(self, rule: Rule, medians: bool) -> bool:
        """Whether this rule was not asked about before; from now on it was."""
        new = (rule, medians) not in self._seen
        self._seen.add((rule, medians))
        return new

    def add(self, tried: Tried) -> None:
        self.best = sorted([*self.best, tried])[:_POOL]

    def parent(self, rng: random.Random) -> Tried:
        """One of the pool, rather a good one."""
        return self.best[int(len(self.best) * rng.random() ** 2)]


def varied(rule: Rule, rng: random.Random) -> Rule:
    """The same with one to three knobs turned a little, or a lot."""
    knobs = list(rule)
    for _ in range(rng.choice((1, 1, 2, 3))):
        knob = rng.randrange(len(knobs))
        step = rng.choice(_STEPS)
        knobs[knob] += rng.randint(-step, step)
    return Rule(*map(_legal, Rule._fields, knobs))


def _legal(name: str, value: int) -> int:
    if name not in _SIGNED:
        value = max(0, value)
    return min(value, _AT_MOST.get(name, value))
