"""What a rank keeps of the other ranks' stages: the tree of their modules, with forms in place of tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from pipex.partition.stage import Stage
from pipex.torch_internals import buffers_of, children_of, parameters_of


def without_others(stages: Sequence[Stage], own: Collection[int]) -> list[Stage]:
    """All stages of a model: the ``own`` as they are, and of each other one a skeleton. It has the same names, but its
    modules cannot run, and its tensors are on the meta device: they have a shape and a dtype, and no memory.

    What an own stage shares with another one is the own one's in both.
    """
    kept = _Kept()
    for index in own:
        for module in stages[index].layers.modules():
            kept.modules[module] = module
            kept.parameters |= {id(p): p for p in parameters_of(module).values() if p is not None}
            kept.buffers |= {id(b): b for b in buffers_of(module).values() if b is not None}
    return [stage if stage.index in own else kept.skeleton(stage) for stage in stages]


class _Kept:
    """What stands for each module and tensor of the model: itself, or its form."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, nn.Module] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        self.buffers: dict[int, Tensor] = {}

    def skeleton(self, stage: Stage) -> Stage:
        found = copy(stage)
        found._modules = {"layers": nn.ModuleList(map(self.module, stage.layers))}
        return found

    def module(self, module: nn.Module) -> nn.Module:
        if module in self.modules:
            return self.modules[module]
        self.modules[module] = bare = nn.Module()
        for name, parameter in parameters_of(module).items():
            parameters_of(bare)[name] = None if parameter is None else self.parameter(parameter)
        for name, buffer in buffers_of(module).items():
            persistent = name not in module._non_persistent_buffers_set
            bare.register_buffer(name, None if buffer is None else self.buffer(buffer), persistent)
        for name, child in children_of(module).items():
            children_of(bare)[name] = None if child is None else self.module(child)
        return bare

    def parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self.parameters:
            self.parameters[id(parameter)] = nn.Parameter(_form(parameter), parameter.requires_grad)
        return self.parameters[id(parameter)]

    def buffer(self, buffer: Tensor) -> Tensor:
        return self.buffers.setdefault(id(buffer), _form(buffer))


def _form(tensor: Tensor) -> Tensor:
    shape = (0,) if nn.parameter.is_lazy(tensor) else tensor.shape
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
