"""Rules of the list scheduler, varied: where the search goes from the portfolio."""

from __future__ import annotations

import random
from typing import NamedTuple

from pipex.plan.list_scheduler import Rule

_KEPT = 6
"""Few enough that the best get most of the tries, enough that one rule's neighbours are not all there is."""

_WIDTHS = (20, 100, 300)
"""How far a knob may be turned, in thousandths of its range."""

_RANGES = Rule(
    forward_slope=3000,
    input_slope=5000,
    pace=2000,
    group=1000,
    input_lead=300,
    weight_delay=1200,
    weight_skew=1600,
    look=1000,
    overrun=1000,
    earliness=3000,
    share=1000,
)
"""Over so much of a knob good rules are found."""

_SIGNED = frozenset({"input_lead", "weight_delay", "weight_skew"})
_UNBOUND = 100_000
"""An earliness that holds nothing back."""


class Tried(NamedTuple):
    """A rule, and the time that it gave."""

    value: int
    rule: Rule
    medians: bool
    """whether it planned with the medians of the times, to be replayed on the true ones"""


class Pool:
    """The best rules for one placement, each with another time: rules with the same make the same orders mostly."""

    def __init__(self) -> None:
        self.kept: list[Tried] = []
        self._asked: set[tuple[Rule, bool]] = set()

    def is_new(self, rule: Rule, medians: bool) -> bool:
        """Whether this rule was not asked about before; from now on it was."""
        new = (rule, medians) not in self._asked
        self._asked.add((rule, medians))
        return new

    def add(self, tried: Tried) -> None:
        """Keeps it if it is among the best; of equal ones the newer, which is how the pool moves where it is flat."""
        others = [kept for kept in self.kept if kept.value != tried.value]
        self.kept = sorted([*others, tried])[:_KEPT]

    def parent(self, rng: random.Random) -> Tried:
        """One of the pool, rather a good one."""
        return self.kept[biased(len(self.kept), rng)]


def biased(count: int, rng: random.Random) -> int:
    """0 … count-1, rather a small one."""
    return int(count * rng.random() ** 2)


def varied(rule: Rule, rng: random.Random) -> Rule:
    """The same with one to three knobs turned a little, or a lot."""
    knobs = rule._asdict()
    for _ in range(rng.choice((1, 1, 2, 3))):
        knob = rng.choice(Rule._fields)
        width = getattr(_RANGES, knob) * rng.choice(_WIDTHS) // 1000
        if knob == "group" and rng.random() < 0.2:
            knobs[knob] = 0 if knobs[knob] else rng.randint(100, 1100)
        elif knob == "earliness" and rng.random() < 0.2:
            knobs[knob] = rng.randint(0, 3000) if knobs[knob] >= _UNBOUND else _UNBOUND
        else:
            knobs[knob] += sum(rng.randint(-width, width) for _ in range(2))
        if knob not in _SIGNED:
            knobs[knob] = max(0, knobs[knob])
    knobs["overrun"] = min(1000, knobs["overrun"])
    return Rule(**knobs)
