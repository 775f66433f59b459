"""Blueprint and layout of a model that is in stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pipex.layout import Blueprint, Held, Layout, Tie, ties_of
from pipex.partition.skeleton import kind_of
from pipex.partition.stage import Stage
from pipex.plan import Plan


def blueprint_of(stages: Sequence[Stage]) -> Blueprint:
    """All stages of a model, in order, without tensors.

    Raises:
        UnsupportedModule: as ``Stage.names``.
    """
    layers = [kind_of(layer) for stage in stages for layer in stage.layers]
    tensors: dict[str, Tensor] = {}
    where: dict[str, set[int]] = {}
    for name, tensor, layer in _placed(stages):
        tensors.setdefault(name, tensor)
        where.setdefault(name, set()).add(layer)
    held = [
        Held(name, _form(tensor), _nbytes(tensor), isinstance(tensor, nn.Parameter), tuple(sorted(where[name])))
        for name, tensor in tensors.items()
    ]
    return Blueprint(tuple(layers), tuple(held))


def tensors_of(stages: Sequence[Stage]) -> dict[str, Tensor]:
    """The tensors of a model, by their names in its blueprint."""
    return {name: tensor for name, tensor, _ in reversed(_placed(stages))}


def _placed(stages: Sequence[Stage]) -> list[tuple[str, Tensor, int]]:
    """(name, tensor, layer) wherever one stands."""
    found = []
    for stage in stages:
        names = {id(tensor): name for name, tensor in stage.names.items()}
        for path, tensor in _tensors(stage.layers):
            position, _, _ = path.partition(".")
            name = names.get(id(tensor)) or stage.called(path)
            found.append((name, tensor, stage.first_layer + int(position)))
    return found


def layout_of(plan: Plan, stages: Sequence[Stage]) -> Layout:
    """Where everything is while the plan runs. Raises as ``blueprint_of`` and ``Layout``."""
    return Layout(plan, blueprint_of(stages), _counts(stages))


def tied(stages: Sequence[Stage], copies: int = 1) -> tuple[Tie, ...]:
    """The parameters that several stages hold, as ``ties_of``. Raises as ``blueprint_of``."""
    return ties_of(blueprint_of(stages), _counts(stages), copies)


def _counts(stages: Sequence[Stage]) -> tuple[int, ...]:
    return tuple(len(stage.layers) for stage in stages)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _form(tensor: Tensor) -> str:
    shape = "0" if nn.parameter.is_lazy(tensor) else ", ".join(map(str, tensor.shape))  # as skeletons have it
    return f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]"


def _nbytes(tensor: Tensor) -> int:
    return 0 if nn.parameter.is_lazy(tensor) else tensor.numel() * tensor.itemsize
