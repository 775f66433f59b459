"""Gates: what stands in a stage's tree in place of layers and outer modules, and decides which of their calls run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipex.partition.own_forward.tree import junk
from pipex.torch_internals import children_of, parameters_of


class Crossing(Protocol):
    """What a call of a gate asks."""

    def call(self, gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the call returns."""


class Left(BaseException):
    """The stage is at its end: the rest of the forward is for others. No error, and so nothing that code in between
    catches as one."""


class Gate(nn.Module):
    """Args:
    path: of what it stands for.
    bare: that without its memory, for what code around it asks of it (its attributes).
    find: the module itself, where the stage has it.
    device: of the stage.
    """

    crossing: Crossing | None

    def __init__(self, path: str, bare: nn.Module, find: Callable[[], nn.Module] | None, device: torch.device) -> None:
        super().__init__()
        own = vars(self)
        own["path"], own["bare"], own["find"], own["crossing"] = path, bare, find, None
        own["device"] = device
        # For the model to find a parameter, which it asks for its device and dtype.
        if find is not None:
            children_of(self)["0"] = find()
        elif (first := next(bare.parameters(), None)) is not None:
            parameters_of(self)["form"] = nn.Parameter(junk(first.shape, first.dtype, device), requires_grad=False)

    @property
    def real(self) -> nn.Module:
        """The module."""
        found: nn.Module = vars(self)["find"]()
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        crossing = vars(self)["crossing"]
        if crossing is None:  # a checkpoint runs it again, in a backward
            return self.real(*args, **kwargs)
        return crossing.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            own = vars(self)
            if "bare" not in own:
                raise
            if own["find"] is not None:
                return getattr(own["find"](), name)
            found = getattr(own["bare"], name)
            return junk(found.shape, found.dtype, own["device"]) if isinstance(found, Tensor) else found
