"""How long a step takes, and for which share of it the ranks are idle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Bubbles(NamedTuple):
    """The length of a step, and its bubble, under both meanings of each.

    Attributes:
        makespan: last end minus first start over all ranks. With two copies of a model the end is that of their
            gradients' sum, here and below. What a step costs that ends with a barrier: a gradient
            norm, a loss that every rank learns.
        span: last end minus first start of a rank; the largest over the ranks. What a step costs without a barrier,
            as every rank then starts the next step when it has ended this one.
        bubble_span: per rank the idle share between its first start and last end; the largest over the ranks (arXiv
            2401.10241, section 5.3). The bubble of a step without a barrier.
        bubble_makespan: idle share of all ranks over the whole makespan. The bubble of a step with a barrier.
    """

    makespan: float
    span: float
    bubble_span: float
    bubble_makespan: float


def busy_times(actions: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The start and end of each time in which a rank ran something, from those of its actions, in the order of their
    starts: parts of a pair may have run at once."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(actions):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def bubbles(ranks: Sequence[Sequence[tuple[float, float]]], ends: Sequence[float] | None = None) -> Bubbles:
    """Of a step in which every rank ran something.

    Args:
        ranks: per rank the start and end of its compute actions, in the order in which it ran them,
            none at once with another (``busy_times``).
        ends: per rank when the step is over for it; None: with its last action.
    """
    ends = ends or [rank[-1][1] for rank in ranks]
    busy = [sum(end - start for start, end in rank) for rank in ranks]
    spans = [end - rank[0][0] for rank, end in zip(ranks, ends, strict=True)]
    makespan = max(ends) - min(rank[0][0] for rank in ranks)
    return Bubbles(
        makespan=makespan,
        span=max(spans),
        bubble_span=max(_idle_share(b, s) for b, s in zip(busy, spans, strict=True)),
        bubble_makespan=_idle_share(sum(busy), len(busy) * makespan),
    )


def _idle_share(busy: float, total: float) -> float:
    return 1 - busy / total if total else 0.0
