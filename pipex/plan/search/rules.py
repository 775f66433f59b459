"""Rules of the list scheduler, varied: where the search goes from the portfolio."""

from __future__ import annotations

import random
from typing import NamedTuple

from pipex.plan.list_scheduler import PORTFOLIO, Rule
from pipex.plan.placement import PlacementName

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


# Found by varying rules in 150 random cells (3 to 32 ranks, 2 to 256 micro-batches, memory from half to twice that of
# 1f1b, six ratios of F, I and W, hops up to a tenth of F, even and uneven ranks), and chosen together. In 80 other
# cells those for the V leave half of the distance to the bound that the portfolio leaves. The last of each is for a
# cell of which much is known: 8 ranks and 32 micro-batches, with 4 chunks and 8 of memory, or on a V with 4 of memory.
STARTS: dict[PlacementName, tuple[Rule, ...]] = {
    "loop": (*PORTFOLIO["loop"], Rule(1348, 2575, 1270, 532, -7, 369, 654, 258, 859, _UNBOUND, 0)),
    "bidirectional": PORTFOLIO["bidirectional"],
    "v": (
        *PORTFOLIO["v"],
        Rule(1306, 5663, 796, 44, -8, 864, -319, 307, 619, _UNBOUND, 374),
        Rule(1033, 1036, 575, 0, -33, 1067, -481, 256, 82, 1653, 486),
        Rule(760, 1450, 562, 0, -23, 1597, -464, 290, 359, 2529, 204),
        Rule(2201, 2431, 1667, 164, -641, 2079, -274, 734, 523, _UNBOUND, 950),
        Rule(2970, 2558, 658, 0, -102, 339, 2285, 582, 380, _UNBOUND, 995),
        Rule(1894, 2880, 826, 0, -46, 839, -160, 198, 1000, _UNBOUND, 962),
        Rule(1056, 2763, 696, 0, -1, 937, 308, 209, 317, _UNBOUND, 849),
        Rule(697, 894, 653, 0, -29, 256, 400, 151, 0, 572, 709),
        Rule(1072, 1304, 2280, 100, 90, 1830, -1304, 140, 22, 1676, 458),
        Rule(1002, 1092, 622, 0, 10, 371, -255, 297, 311, 1476, 0),
        Rule(352, 1378, 937, 0, -141, 947, -536, 102, 105, 1258, 272),
    ),
}
"""Per placement the rules with which a search begins."""
