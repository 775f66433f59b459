"""Cutting a model into stages."""

from __future__ import annotations

from torch import nn

from pipex.partition.balance import Balance, layer_counts
from pipex.partition.layers import canonical_names, layers_of
from pipex.partition.stage import Stage


def split_model(model: nn.Module, stages: int, balance: Balance = "uniform") -> list[Stage]:
    """Cuts a model into contiguous stages; applied one after another they compute what the model computes.

    Args:
        model: an ``nn.Sequential``, or a module with an attribute ``pipeline_layers`` (see ``layers_of``).
        stages: number of stages, at most the number of layers.
        balance: ``"uniform"``: layer counts differ by at most one, and the first stages get the extra layers;
            ``"parameters"``: the largest stage has as few parameters as any contiguous cut allows;
            a list of ints: the layer count of each stage.

    Raises:
        InputError: more stages than layers, or a balance that does not fit.
        UnsupportedModule: the model does not name its layers, or a parameter or buffer of it is in none of them.
    """
    layers = layers_of(model)
    canonical = canonical_names(model)
    parts: list[Stage] = []
    first = 0
    for index, count in enumerate(layer_counts(layers, stages, balance)):
        parts.append(Stage(index, stages, first, layers[first : first + count], canonical))
        first += count
    assert [layer for part in parts for layer in part.layers] == layers, "every layer lands exactly once, in order"
    return parts
