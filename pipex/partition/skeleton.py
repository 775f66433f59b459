"""What a rank keeps of the other ranks' stages: the tree of their modules, with forms in place of tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pipex.partition.stage import Stage
from pipex.torch_internals import buffers_of, children_of, non_persistent_of, parameters_of


def without_others(stages: Sequence[Stage], own: Collection[int]) -> list[Stage]:
    """All stages of a model: the ``own`` as they are, and of each other one a skeleton. It has the same names, but its
    modules cannot run, and its tensors are on the meta device: they have a shape and a dtype, and no memory.

    What an own stage shares with another one is the own one's in both.
    """
    skeletons = Skeletons()
    for index in own:
        skeletons.keep(stages[index].layers)
    found = []
    for stage in stages:
        if stage.index not in own:
            stage = stage.without_layers(nn.ModuleList(map(skeletons.of, stage.layers)))
        found.append(stage)
    return found


class Described(nn.Module):
    """``kind``: what it is in words, such as the class of what it stands for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


class _Skeleton(Described):
    pass


def kind_of(module: nn.Module) -> str:
    """The name of a module's class, or what it says instead."""
    return module.kind if isinstance(module, Described) else type(module).__name__


class Skeletons:
    """Makes skeletons of modules, one of each. The modules are held weakly, and so may go."""

    def __init__(self) -> None:
        self._modules: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._tensors: Any = WeakTensorKeyDictionary()  # which torch has not typed
        # By id of what stands for it in a skeleton: what turned out to be kept after that was made.
        self._late_modules: dict[int, nn.Module] = {}
        self._late_tensors: dict[int, Tensor] = {}

    def keep(self, root: nn.Module) -> None:
        """Lets a module, and all that is in it, stand for itself."""
        for module in root.modules():
            self._late_modules[id(self._modules.get(module, module))] = module
            self._modules[module] = module
            for tensor in (*parameters_of(module).values(), *buffers_of(module).values()):
                if tensor is not None:
                    self._late_tensors[id(self._tensors.get(tensor, tensor))] = tensor
                    self._tensors[tensor] = tensor

    def settle(self, skeleton: nn.Module) -> nn.Module:
        """A skeleton that was made before all was known that is kept: with that in its places."""
        for module in list(skeleton.modules()):
            for tensors in (parameters_of(module), buffers_of(module)):
                _replace(tensors, self._late_tensors)
            _replace(children_of(module), self._late_modules)
        return self._late_modules.get(id(skeleton), skeleton)

    def of(self, module: nn.Module) -> nn.Module:
        """The skeleton of a module, or what is kept of it."""
        if module in self._modules:
            return self._modules[module]
        self._modules[module] = bare = _Skeleton(kind_of(module))
        for name, parameter in parameters_of(module).items():
            parameters_of(bare)[name] = None if parameter is None else cast(nn.Parameter, self._form(parameter))
        for name, buffer in buffers_of(module).items():
            persistent = name not in non_persistent_of(module)
            bare.register_buffer(name, None if buffer is None else self._form(buffer), persistent)
        for name, child in children_of(module).items():
            children_of(bare)[name] = None if child is None else self.of(child)
        return bare

    def _form(self, tensor: Tensor) -> Tensor:
        if tensor not in self._tensors:
            shape = (0,) if nn.parameter.is_lazy(tensor) else tensor.shape
            form = torch.empty(shape, dtype=tensor.dtype, device="meta")
            if isinstance(tensor, nn.Parameter):
                form = nn.Parameter(form, tensor.requires_grad)
            self._tensors[tensor] = form
        return cast(Tensor, self._tensors[tensor])


def _replace(held: MutableMapping[str, Any], late: Mapping[int, Any]) -> None:
    for name, one in held.items():
        if id(one) in late:
            held[name] = late[id(one)]
