"""Which stages to spare: to recompute, or to offload, so that a rank holds less between their F and I.

Whatever the order, about as many micro-batches are between F and I of a stage as are begun in the time that one needs
for the way from there to the last stage and back (Little's law); so the shallowest stages of a rank hold the most. They
are spared first, until the others would fit: with that time as short as it can be, or longer, as it is in most orders.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from math import inf
from typing import NamedTuple

from pipex.plan.bounds import SLACK, Spare
from pipex.plan.list_scheduler import Packed, unpack
from pipex.plan.memory import with_promise
from pipex.plan.plan import Plan
from pipex.plan.search.space import Space

_STRETCHES = (1.0, 1.2, 1.5, 2.0, 3.0, inf)
"""How many times as long as it can be the way of a micro-batch may take; however long, if all are begun at once."""


class Choice(NamedTuple):
    """The stages of a plan that are spared, rising."""

    recomputed: tuple[int, ...]
    offloaded: tuple[int, ...]


def promising(space: Space, spare: Collection[Spare]) -> list[Space]:
    """Spaces of the same placement, each once, those first that spare fewer stages: those that offload as long as a
    rank's copies take less time than its work and then recompute, and those that only recompute."""
    ways = [tuple(way for way in ("offload", "recompute") if way in spare)]
    if len(ways[0]) > 1:
        ways.append(("recompute",))
    found = [_choice(space, way, stretch) for stretch in _STRETCHES for way in ways]
    return [space.sparing(*choice) for choice in dict.fromkeys(found) if any(choice)]


def _choice(space: Space, ways: tuple[str, ...], stretch: float) -> Choice:
    problem, costs, stages_of = space.problem, space.costs, space.problem.stages_of
    picked: dict[str, list[int]] = {"offload": [], "recompute": []}
    for rank, stages in enumerate(stages_of):
        work = sum(costs.forward[s] + costs.input_gradient[s] + costs.weight_gradient[s] for s in stages)
        passing = {s: len(problem.microbatches_at[s]) for s in stages}
        interval = {s: problem.interval * space.microbatches / max(1, passing[s]) for s in stages}
        begun = {s: max(1.0, stretch * problem.lifetimes[s] / max(1.0, interval[s])) for s in stages}
        under_way = {s: min(passing[s], begun[s]) for s in stages}
        held = sum(under_way[s] * costs.activation[s] for s in stages)
        copies = 0.0
        for stage in sorted(stages, key=lambda s: problem.lifetimes[s], reverse=True):
            if held <= space.activations[rank]:
                break
            copy = 0.0 if costs.offload is None else costs.offload[stage]
            way = "offload" if "offload" in ways and copies + copy <= work else ways[-1]
            spared = costs.spared((stage,) * (way == "recompute"), (stage,) * (way == "offload"))
            copies += copy * (way == "offload")
            held -= under_way[stage] * (costs.activation[stage] - spared.activation[stage])
            picked[way].append(stage)
    return Choice(tuple(sorted(picked["recompute"])), tuple(sorted(picked["offload"])))


def neighbour(space: Space, spare: Collection[Spare], rng: random.Random) -> Choice:
    """The space's choice with something else done with one stage, or with one chunk on all ranks."""
    stages, ranks = range(space.placement.stages), space.placement.ranks
    chosen = {**dict.fromkeys(space.recomputed, "recompute"), **dict.fromkeys(space.offloaded, "offload")}
    stage = rng.choice(stages)
    way = rng.choice([way for way in ("", *sorted(spare)) if way != chosen.get(stage, "")])
    same_chunk = [other for other in stages if other // ranks == stage // ranks]
    chosen.update(dict.fromkeys(same_chunk if rng.random() < 0.2 else [stage], way))
    return Choice(*(tuple(s for s in stages if chosen.get(s) == way) for way in ("recompute", "offload")))


def with_copies(space: Space, family: str, packed: Packed) -> Plan:
    """The plan of orders that offload, whose copies have as much time as the limit allows."""
    plan = Plan(
        family, space.placement, space.microbatches, unpack(space.problem, packed), (0,) * space.placement.ranks,
        recomputed=space.recomputed, offloaded=space.offloaded,
    )  # fmt: skip
    return with_promise(plan, (space.costs, [most * SLACK for most in space.activations]))
