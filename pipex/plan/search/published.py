"""The published orders, as far as they fit the sizes: candidates that need no planning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from statistics import median

from pipex.errors import InputError
from pipex.plan.costs import Costs
from pipex.plan.families import build, options_of
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.search.space import Space

ONLY_BY_NAME = frozenset({"dualpipe", "chimera", "pipedream", "pipedream-2bw", "forward-only"})
"""Families with two copies of the weights or several versions of them, or without a backward: they compute something
else than the others, or hold more, so nobody wants one of them just because it is faster."""


def published(
    spaces: Mapping[Placement, Space], limit: Sequence[float] | None, families: Sequence[str]
) -> Iterator[Plan]:
    """The plans of ``families`` on these placements, with all their numbers of chunks. zb-auto, which is a way to plan
    rather than an order, plans with the true and with the median times."""
    some = next(iter(spaces.values()))
    ranks, microbatches = some.placement.ranks, some.microbatches
    for family in families:
        choices: list[dict[str, object]] = [{}]
        if family == "zb-auto":
            memory = list(limit or [inf] * ranks)
            chain = spaces.get(Placement("loop", ranks))
            choices = [{"costs": costs, "memory": memory} for costs in _true_and_medians(chain.costs)] if chain else []
        elif "chunks" in options_of(family):
            choices = [
                {"chunks": chunks} for chunks in sorted({placement.chunks for placement in spaces}) if chunks > 1
            ]
        elif "warmup" in options_of(family):
            choices = [{"warmup": 0}, {"warmup": ranks - 1}]
        for chosen in choices:
            try:
                plan = build(family, ranks, microbatches, **chosen)
            except InputError:
                continue  # the sizes or the memory do not fit this family
            if plan.placement in spaces:
                yield plan


def _true_and_medians(costs: Costs) -> list[Costs]:
    kinds = costs.forward, costs.input_gradient, costs.weight_gradient
    if not any(len(set(times)) > 1 for times in kinds):
        return [costs]
    f, i, w = ([median(times)] * len(times) for times in kinds)
    return [costs, replace(costs, forward=f, input_gradient=i, weight_gradient=w)]
