"""How many layers each stage gets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

from torch import nn

from pipex.errors import InputError

Balance = Literal["uniform", "parameters"] | Sequence[int]


def layer_counts(layers: Sequence[nn.Module], stages: int, balance: Balance) -> list[int]:
    """The number of layers of each stage, in stage order; each at least 1, in sum ``len(layers)``.

    Raises:
        InputError: there are fewer layers than stages, ``balance`` is unknown, or counts that do not fit.
    """
    if not 1 <= stages <= len(layers):
        raise InputError(
            f"a model of {len(layers)} layers cannot be cut into {stages} stages",
            needed=f"1 to {len(layers)} stages",
            fix="use fewer stages, or name smaller layers",
        )
    if balance == "uniform":
        return uniform(len(layers), stages)
    if balance == "parameters":
        return by_parameters(layers, stages)
    if isinstance(balance, str):
        raise InputError("unknown balance", got=repr(balance), needed="'uniform', 'parameters' or a list of counts")
    counts = list(balance)
    if len(counts) != stages or sum(counts) != len(layers) or min(counts) < 1:
        raise InputError(
            "the layer counts do not fit",
            got=f"{counts} ({len(counts)} stages, {sum(counts)} layers)",
            needed=f"{stages} counts of at least 1 with the sum {len(layers)}",
        )
    return counts


def uniform(layers: int, stages: int) -> list[int]:
    """Counts that differ by at most one.

    The first stages get the extra layers: the first layer of a language model, the embedding, costs almost no
    compute, and the last stage also computes the loss.
    """
    least, extra = divmod(layers, stages)
    return [least + (stage < extra) for stage in range(stages)]


def by_parameters(layers: Sequence[nn.Module], stages: int) -> list[int]:
    """The contiguous cut whose largest stage has the fewest parameters (elements); exact.

    A parameter that several layers share counts once in every stage that uses it. Dynamic programming over
    (stage, end): ``best[end]`` is the best cut of the first ``end`` layers into the stages so far, compared by its
    largest stage and, among equals, by the sum of squares, which evens out the stages below the largest.
    """
    # No optimal cut has a stage larger than the largest of the uniform cut, so longer blocks need no look.
    cuts = accumulate(uniform(len(layers), stages), initial=0)
    limit = max(_parameters(layers[begin:end]) for begin, end in pairwise(cuts))
    sizes = [_prefix_sizes(layers[begin:], limit) for begin in range(len(layers) + 1)]

    # end -> (largest stage, sum of squares, counts of the stages)
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for _ in range(stages):
        longer: dict[int, tuple[int, int, list[int]]] = {}
        for begin, (largest, squares, counts) in best.items():
            for count, size in enumerate(sizes[begin], start=1):
                cut = (max(largest, size), squares + size * size, [*counts, count])
                longer[begin + count] = min(longer.get(begin + count, cut), cut)
        best = longer
    return best[len(layers)][2]


def _parameters(layers: Sequence[nn.Module]) -> int:
    return sum(parameter.numel() for parameter in nn.ModuleList(layers).parameters())


def _prefix_sizes(layers: Sequence[nn.Module], limit: int) -> list[int]:
    """Parameters in the first 1, 2, ... of the layers, as far as they stay within the limit."""
    sizes: list[int] = []
    seen: set[nn.Parameter] = set()
    size = 0
    for layer in layers:
        new = set(layer.parameters()) - seen
        seen |= new
        size += sum(parameter.numel() for parameter in new)
        if size > limit:
            break
        sizes.append(size)
    return sizes
