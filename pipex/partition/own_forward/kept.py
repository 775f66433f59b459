"""What modules keep from one forward to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipex.errors import UnsupportedModule
from pipex.torch_internals import TorchDispatchMode, buffers_of, storage_id

Kept = dict[tuple[str, str], Any]
"""By path of a module and name: plain values, and clones of tensors."""

_PLAIN = (bool, int, float, complex, str, type(None))


def kept_by(modules: Mapping[str, nn.Module]) -> Kept:
    """Of modules and all that is in them: their buffers, and their own attributes that are plain or tensors."""
    found: Kept = {}
    for path, module in modules.items():
        for inner, part in module.named_modules(prefix=path):
            found |= {(inner, name): clone(value) for name, value in own_state(part).items()}
    return found


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Of one module, those that are plain or tensors."""
    return {n: v for n, v in vars(module).items() if n[0] != "_" and isinstance(v, (*_PLAIN, Tensor))}


def own_state(module: nn.Module) -> dict[str, Any]:
    """Of one module."""
    return own_attributes(module) | {name: buffer for name, buffer in buffers_of(module).items() if buffer is not None}


def changed(before: Kept, after: Kept) -> list[tuple[str, str]]:
    """What is not the same any more."""
    return [place for place, value in after.items() if place not in before or not _same(before[place], value)]


def refuse_changes(before: Kept, after: Kept) -> None:
    """Raises UnsupportedModule if what runs on every stage keeps what each forward changes: every stage would have its
    own. (What each forward sets anew is none of this.)"""
    for path, name in changed(before, after):
        raise UnsupportedModule(
            f"{path or 'the model'} keeps what its forward changes, beside its layers", got=f"a change of {name}",
            needed="nothing that changes from one forward to the next, since it runs on every stage",
            fix="keep it in a layer, or leave the model whole",
        )  # fmt: skip


class Unwritten(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Around a forward: raises RuntimeError where it would write to one of the model's parameters, as some do that
    scale them for evaluation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = {storage_id(p.untyped_storage()) for p in model.parameters() if not p.is_meta}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place = func.name().split(".")[0].endswith("_") and args and isinstance(args[0], Tensor)
        if in_place and storage_id(args[0].untyped_storage()) in self._memory:
            raise RuntimeError("a write to a parameter")
        return func(*args, **(kwargs or {}))


def clone(value: Any) -> Any:
    """Of a tensor, without a graph; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) and not nn.parameter.is_lazy(value) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.is_meta:
            return one.shape == other.shape and one.dtype == other.dtype
        return torch.equal(one.nan_to_num() if one.is_floating_point() else one,
                           other.nan_to_num() if other.is_floating_point() else other)  # fmt: skip
    return type(one) is type(other) and one == other
