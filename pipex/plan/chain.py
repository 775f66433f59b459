"""A row of layers cut into stages that stand for themselves: exact, by dynamic programming over (stage, end)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from pipex.errors import InputError

Blocks = Callable[[int, int], Iterable[tuple[int, float]]]
"""(stage, begin) -> (end, size) of the blocks that this stage may get, ends rising."""


def check_stages(layers: int, stages: int) -> None:
    """Raises InputError unless every stage can get at least one layer."""
    if not 1 <= stages <= layers:
        raise InputError(
            f"a model of {layers} layers cannot be cut into {stages} stages",
            needed=f"1 to {layers} stages",
            fix="use fewer stages, or name smaller layers",
        )


def uniform(layers: int, stages: int) -> list[int]:
    """Counts that differ by at most one.

    The first stages get the extra layers: the first layer of a language model, the embedding, costs almost no
    compute, and the last stage also computes the loss.
    """
    least, extra = divmod(layers, stages)
    return [least + (stage < extra) for stage in range(stages)]


def chain(layers: int, stages: int, blocks: Blocks) -> tuple[float, list[int]] | None:
    """The cut whose largest block is smallest, exact; of these the one with the smallest sum of squares, which evens
    out the blocks below the largest. Returns the largest size and the counts, or None where no cut is possible."""
    first = _chain(layers, stages, blocks, 0)
    if first is None:
        return None
    # Once more with every size up to the optimum counted alike: only so are the squares minimised over all cuts.
    second = _chain(layers, stages, blocks, first[0])
    assert second is not None
    return second


def _chain(layers: int, stages: int, blocks: Blocks, at_least: float) -> tuple[float, list[int]] | None:
    # Per number of stages: end -> the best cut of the layers before it: (largest, sum of squares, begin of its last)
    table: list[dict[int, tuple[float, float, int]]] = [{0: (at_least, 0, 0)}]
    for stage in range(stages):
        last = layers - (stages - 1 - stage)  # every later stage needs a layer
        longer: dict[int, tuple[float, float, int]] = {}
        for begin, (largest, squares, _) in table[-1].items():
            for end, size in blocks(stage, begin):
                if end > last:
                    break
                candidate = (size if size > largest else largest, squares + size * size, begin)
                if end not in longer or candidate < longer[end]:
                    longer[end] = candidate
        table.append(longer)
    if layers not in table[-1]:
        return None
    ends = [layers]
    for row in reversed(table[1:]):
        ends.append(row[ends[-1]][2])
    ends.reverse()
    return table[-1][layers][0], [end - begin for begin, end in pairwise(ends)]
