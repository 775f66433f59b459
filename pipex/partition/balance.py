"""How many layers each stage gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Literal

from torch import nn

from pipex.errors import InputError
from pipex.plan import Plan
from pipex.plan.chain import chain, check_stages, uniform
from pipex.plan.fit import fit
from pipex.plan.layer_costs import LayerCosts, best_cut
from pipex.plan.placement import Placement

Balance = Literal["uniform", "parameters", "profile"] | LayerCosts | Sequence[int]


def layer_counts(layers: int | Sequence[nn.Module], where: int | Plan, balance: Balance) -> list[int]:
    """The number of layers of each stage, in stage order; each at least 1, in sum that of ``layers``.

    Args:
        layers: or their number, where ``balance`` does not ask for more.
        where: the number of stages, each on a rank of its own, or the plan that they are for: its stages, those of one
            copy of the model.

    Raises:
        InputError: there are fewer layers than stages, ``balance`` is unknown, or counts or costs that do not fit.
    """
    stages = pieces_of(where)
    number = layers if isinstance(layers, int) else len(layers)
    check_stages(number, stages)
    if isinstance(balance, LayerCosts):
        return by_costs(number, where, balance)
    if balance == "uniform":
        return uniform(number, stages)
    if balance == "parameters" and not isinstance(layers, int):
        return by_parameters(layers, stages)
    if isinstance(balance, str) or not hasattr(balance, "__len__"):
        names = "'uniform'" if isinstance(layers, int) else "'uniform', 'parameters', 'profile'"
        known = f"{names}, layer costs or a list of counts"
        raise InputError("unknown balance", got=repr(balance), needed=known)
    counts = list(balance)
    if len(counts) != stages or sum(counts) != number or min(counts) < 1:
        raise InputError(
            "the layer counts do not fit",
            got=f"{counts} ({len(counts)} stages, {sum(counts)} layers)",
            needed=f"{stages} counts of at least 1 with the sum {number}",
        )
    return counts


def pieces_of(where: int | Plan) -> int:
    """Into how many pieces the model is to be cut: a plan's stages, of one copy of the model."""
    return where if isinstance(where, int) else where.placement.pieces


def by_costs(layers: int, where: int | Plan, costs: LayerCosts) -> list[int]:
    """The cut whose fullest rank has the least to do; for a plan, the one with which its step is simulated shortest."""
    if len(costs.layers) != layers:
        raise InputError(
            "the layer costs are of another model",
            got=f"costs of {len(costs.layers)} layers for a model of {layers}",
            needed="one entry per layer",
            fix="profile this model",
        )
    if isinstance(where, int):
        return list(best_cut(costs, Placement("loop", where)).counts)
    return list(fit(costs, where).counts)


def by_parameters(layers: Sequence[nn.Module], stages: int) -> list[int]:
    """The contiguous cut whose largest stage has the fewest parameters (elements); exact.

    A parameter that several layers share counts once in every stage that uses it.
    """
    # No optimal cut has a stage larger than the largest of the uniform cut, so longer blocks need no look.
    cuts = accumulate(uniform(len(layers), stages), initial=0)
    limit = max(_parameters(layers[begin:end]) for begin, end in pairwise(cuts))
    sizes = [_prefix_sizes(layers[begin:], limit) for begin in range(len(layers) + 1)]

    def blocks(_: int, begin: int) -> Iterable[tuple[int, float]]:
        return enumerate(sizes[begin], start=begin + 1)

    found = chain(len(layers), stages, blocks)
    assert found is not None, "the uniform cut keeps the limit"
    return found[1]


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
