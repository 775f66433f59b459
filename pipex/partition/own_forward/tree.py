"""A model's tree, parted: what is cut, what stands around it, and what runs on every stage."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipex.errors import UnsupportedModule
from pipex.torch_internals import buffers_of, children_of, non_persistent_of, parameters_of

Made = TypeVar("Made", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Parted:
    """Attributes:
    layers: by path, in the order of the tree; each module once.
    outer: by path, the topmost modules around them that have parameters or saved buffers.
    ahead: paths of those that stand before the first layer.
    loose: by path, the topmost modules around them that have neither, which every stage has a copy of.
    containers: by path, what has layers inside, the model itself included, and lists of others; their code runs on
        every stage.
    """

    layers: dict[str, nn.Module]
    outer: dict[str, nn.Module]
    ahead: set[str]
    loose: dict[str, nn.Module]
    containers: dict[str, nn.Module]


def part(model: nn.Module, layers: Sequence[str]) -> Parted:
    """Raises UnsupportedModule if a container's forward is not that of its class, and so would run on the model itself
    in place of a copy.

    Args:
        layers: paths.
    """
    parted = Parted({}, {}, set(), {}, {})
    cut = {id(model.get_submodule(path)) for path in layers}
    above = {id(model), *(id(model.get_submodule(p[:end])) for p in layers for end, c in enumerate(p) if c == ".")}
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if id(module) in cut:
            parted.layers[path] = module
        elif id(module) not in above and not isinstance(module, _NEVER_CALLED):
            (parted.outer if _has_tensors(module) else parted.loose)[path] = module
            if not parted.layers:
                parted.ahead.add(path)
        else:
            _check_own_forward(path, module)
            _check_references(path, module)
            parted.containers[path] = module
            for name, child in module.named_children():
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return parted


_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _has_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or bool(module.state_dict())


def _check_own_forward(path: str, module: nn.Module) -> None:
    own = vars(module).get("forward")
    if own is not None and not (isinstance(own, MethodType) and own.__self__ is module):
        raise UnsupportedModule(
            f"{path or 'the model'} has a forward that was set on the object, which runs the model itself",
            got=getattr(own, "__qualname__", type(own).__name__), needed="the forward of its class",
            fix="take off what wraps it (such as accelerate's hooks) before the model is split",
        )  # fmt: skip


def _check_references(path: str, module: nn.Module) -> None:
    """Raises UnsupportedModule if a container holds what has parameters and is no child of it: of what other ranks have
    that would stay what it is now."""
    for name, value in vars(module).items():
        if name in ("_modules", "_parameters", "_buffers"):
            continue
        held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        for one in held:
            if isinstance(one, nn.Parameter) or (isinstance(one, nn.Module) and any(True for _ in one.parameters())):
                raise UnsupportedModule(
                    f"{path or 'the model'} refers to a parameter beside its modules",
                    got=f"{type(one).__name__} in {name}", needed="parameters and modules that are registered",
                    fix="make it a child of the module, or look it up in the forward",
                )  # fmt: skip


def tensors_of_containers(parted: Parted) -> dict[str, Tensor]:
    """By path their own parameters, and those of their buffers that checkpoints hold."""
    found: dict[str, Tensor] = {}
    for path, container in parted.containers.items():
        prefix = f"{path}." if path else ""
        saved = {n: b for n, b in buffers_of(container).items() if n not in non_persistent_of(container)}
        found |= {prefix + n: t for n, t in (*parameters_of(container).items(), *saved.items()) if t is not None}
    return found


class Bare:
    """A copy of a model's tree without the memory of its layers and outer modules. In place of their tensors stands
    what has the form and is not a number, so that whatever uses one shows it.

    Args:
        set_within: by path and name, what these keep and forwards set; it is not there.
    """

    def __init__(self, model: nn.Module, parted: Parted, set_within: Collection[tuple[str, str]]) -> None:
        self.copies: dict[int, nn.Module] = {}
        """by id of the module that one is of"""
        self._tensors: dict[int, Tensor] = {}
        gated = {id(module) for module in (*parted.layers.values(), *parted.outer.values())}
        loose = {id(module) for module in parted.loose.values()}
        self.root = self._of(model, gated, loose, inside=False)
        rebind(self.copies)
        paths = dict(model.named_modules(remove_duplicate=False))
        for path, name in set_within:
            vars(self.copies[id(paths[path])]).pop(name, None)

    def _of(self, module: nn.Module, gated: set[int], loose: set[int], inside: bool) -> nn.Module:
        if id(module) in self.copies:
            return self.copies[id(module)]
        if id(module) in loose and not inside:
            bare = copy_of_loose(module)
        else:
            inside = inside or id(module) in gated
            bare = shallow(module)
            for name, parameter in parameters_of(module).items():
                parameters_of(bare)[name] = None if parameter is None else self._parameter(parameter)
            for name, buffer in buffers_of(module).items():
                if buffer is not None:
                    buffers_of(bare)[name] = self._junk(buffer) if inside else buffer.detach().clone()
            if inside:
                for name, value in vars(module).items():
                    if isinstance(value, Tensor):
                        vars(bare)[name] = self._junk(value)
        self.copies[id(module)] = bare
        if id(module) not in loose or inside:
            for name, child in children_of(module).items():
                children_of(bare)[name] = None if child is None else self._of(child, gated, loose, inside)
        return bare

    def _parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(self._junk(parameter), requires_grad=False)

    def _junk(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = junk(tensor.shape, tensor.dtype, torch.device("cpu"))
        return self._tensors[id(tensor)]


def copy_of_loose(module: Made) -> Made:
    """A copy, where it keeps tensors. What has none is the same on all stages, and goes on to be the model's."""
    return copy.deepcopy(module) if any(True for _ in module.buffers()) else module


def shallow(module: Made) -> Made:
    """A copy of a module with the same tensors and children, in dicts of its own."""
    twin = module.__new__(type(module))  # copy.copy refuses those that are parametrized
    own = vars(twin)
    own.update(vars(module))
    own["_parameters"], own["_buffers"] = dict(parameters_of(module)), dict(buffers_of(module))
    own["_modules"] = dict(children_of(module))
    own["_non_persistent_buffers_set"] = set(non_persistent_of(module))
    return twin


def rebind(copies: Mapping[int, nn.Module]) -> None:
    """Binds methods that stand in attributes, and are bound to one of the modules of the tree, to its copy.

    Args:
        copies: by id of the module.
    """
    for module in copies.values():
        for name, value in list(vars(module).items()):
            if isinstance(value, MethodType) and id(value.__self__) in copies:
                vars(module)[name] = MethodType(value.__func__, copies[id(value.__self__)])


def junk(shape: Sequence[int], dtype: torch.dtype, device: torch.device, value: Any = nan) -> Tensor:
    """One element in place of all of a tensor's: not a number where the dtype has such, else its largest.

    Args:
        value: another one, or of integers the smallest for -inf.
    """
    if dtype is torch.bool:
        value = False
    elif not (dtype.is_floating_point or dtype.is_complex or value == 0):
        value = torch.iinfo(dtype).min if value == -inf else torch.iinfo(dtype).max
    return torch.full((), value, dtype=dtype, device=device).expand(tuple(shape))


def nothing(device: torch.device, value: float = nan) -> Tensor:
    """Stands for a tensor of which not even the form is needed: of no dimension, and of a dtype that models do not use,
    so that code that asks for either shows it."""
    return junk((), torch.float64, device, value)
