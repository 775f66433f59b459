"""A model that is built one layer at a time, since all of it at once is too large for a process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import nn

from pipex.errors import InputError
from pipex.layout import ranges_of
from pipex.partition.allocator import given_back
from pipex.partition.balance import Balance, layer_counts
from pipex.partition.room import room_for_layer
from pipex.partition.skeleton import Skeletons
from pipex.partition.stage import Stage, cut
from pipex.plan import Plan


def build_stages(
    build: Callable[[int], nn.Module], layers: int, plan: Plan, rank: int, balance: Balance = "uniform"
) -> list[Stage]:
    """The stages of a model of which only one rank's own are kept in memory, and forms of the others.

    Every rank calls ``build(0)``, ``build(1)``, ... up to the last layer, in this order, and lets go of the layers that
    are not its own. So initial values that are drawn have the bits that they have in one process, and a rank never
    holds more than its stages and one layer. Tensors are called as in an ``nn.Sequential`` of the layers. What two
    layers share must be one object, which ``build`` keeps. Afterwards glibc maps blocks of 32 MiB and more apart, as it
    comes to do by itself in a process that has freed such.

    Args:
        build: layer number -> the layer.
        layers: how many there are.
        plan: that the stages are for.
        rank: whose stages to keep, such as ``pipex.current_world().rank``.
        balance: as of ``split_model``, but neither ``"parameters"`` nor ``"profile"``, for which the layers would have
            to be there.

    Raises:
        InputError: more stages than layers, another balance, no such rank, or ``build`` returned something else.
        StageTooLarge: there is no memory for another layer.
    """
    if not 0 <= rank < plan.placement.ranks:
        raise InputError("no rank of the plan", got=rank, needed=f"0 to {plan.placement.ranks - 1}")
    counts = layer_counts(layers, plan, balance)
    ranges = ranges_of(counts)
    pieces = {plan.placement.piece(stage) for stage in plan.placement.stages_of(rank)}
    own = {layer for piece in pieces for layer in ranges[piece]}
    stage_of = [stage for stage, layers_of in enumerate(ranges) for _ in layers_of]
    with given_back():
        built = _built(build, stage_of, own)
    return cut(built, counts, nn.Sequential(*built))


def _built(build: Callable[[int], nn.Module], stage_of: Sequence[int], own: Collection[int]) -> list[nn.Module]:
    """``stage_of``: each layer."""
    skeletons = Skeletons()
    found: list[nn.Module] = []
    for number, stage in enumerate(stage_of):
        with room_for_layer(number, stage, [found[n] for n in range(number) if n in own]):
            layer = build(number)
        if not isinstance(layer, nn.Module):
            raise InputError(f"layer {number} was not built", got=type(layer).__name__, needed="an nn.Module")
        if number in own:
            skeletons.keep(layer)
        found.append(skeletons.of(layer))
        del layer
    return [skeletons.settle(layer) for layer in found]
