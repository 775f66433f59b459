"""The published orders, as far as they fit the sizes: candidates that need no planning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import inf
from statistics import median
from typing import get_args

from pipex.errors import InputError
from pipex.plan.actions import Kind
from pipex.plan.costs import Costs
from pipex.plan.families import build, options_of
from pipex.plan.families.chimera import Scaling
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.search.space import Space

TWO_COPIES = frozenset({"dualpipe", "chimera"})
"""Families with two copies of the model."""

ONLY_BY_NAME = frozenset({"pipedream", "pipedream-2bw", "forward-only"})
"""Families with several versions of the weights, or without a backward: they compute something else than the others, so
nobody wants one of them just because it is faster."""


def published(
    spaces: Mapping[Placement, Space],
    limit: Sequence[float] | None,
    families: Sequence[str],
    worth: Callable[[Space, bool], bool],
) -> Iterator[Plan]:
    """The plans of ``families`` on these placements, with all their numbers of chunks.

    Args:
        limit: per rank the memory, for those that plan with it.
        worth: whether plans on a placement, all of whose backwards are B or not, are worth making.
    """
    some = next(iter(spaces.values()))
    ranks, microbatches = some.placement.ranks, some.microbatches
    for family in families:
        for chosen in _choices(family, spaces, limit or [inf] * ranks):
            try:
                small = _small(family, chosen.get("chunks"))
                space = spaces.get(replace(small.placement, ranks=ranks))
                if space is not None and worth(space, not any(a.kind in (Kind.I, Kind.W) for a in small.orders[0])):
                    yield build(family, ranks, microbatches, **chosen)
            except InputError:
                continue  # the sizes or the memory do not fit this family


@cache
def _small(family: str, chunks: object) -> Plan:
    """A plan of few actions, to see what kind of plan it is before a large one is made."""
    return build(family, 2, 4, **({} if chunks is None else {"chunks": chunks}))


def _choices(family: str, spaces: Mapping[Placement, Space], limit: Sequence[float]) -> list[dict[str, object]]:
    """The options to give to the family: what it leaves open."""
    options = options_of(family)
    if family == "zb-auto":  # a way to plan rather than an order
        chain = spaces.get(Placement("loop", len(limit)))
        return [{"costs": costs, "memory": list(limit)} for costs in _true_and_medians(chain.costs)] if chain else []
    if "chunks" in options:
        return [{"chunks": chunks} for chunks in sorted({p.chunks for p in spaces if p.chunks > 1})]
    if "warmup" in options:
        return [{"warmup": 0}, {"warmup": len(limit) - 1}]
    if "scaling" in options:
        return [{"scaling": scaling} for scaling in get_args(Scaling)]
    return [{}]


def _true_and_medians(costs: Costs) -> list[Costs]:
    kinds = costs.forward, costs.input_gradient, costs.weight_gradient
    if not any(len(set(times)) > 1 for times in kinds):
        return [costs]
    f, i, w = ([median(times)] * len(times) for times in kinds)
    return [costs, replace(costs, forward=f, input_gradient=i, weight_gradient=w)]
