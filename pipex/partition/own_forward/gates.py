"""Gates: what stands in a stage's tree in place of layers and outer modules, and decides which of their calls run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipex.errors import UnsupportedModule
from pipex.partition.own_forward.random_numbers import advance
from pipex.partition.own_forward.tree import junk
from pipex.torch_internals import children_of, parameters_of


class Crossing(Protocol):
    """What a call of a gate asks."""

    @property
    def seed(self) -> Callable[[int], None] | None:
        """What it seeds by, if it does."""

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
        own["device"], own["seeded"] = device, False
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
        own = vars(self)
        if own["crossing"] is not None:
            return own["crossing"].call(self, args, kwargs)
        if own["find"] is None:  # a checkpoint runs it again, in a backward
            raise UnsupportedModule(
                f"a checkpoint runs {own['path']} again, which another stage has", got="a cut within what it holds",
                needed="a cut ahead of it or behind it", fix="checkpoint layer by layer, or cut elsewhere (balance=)",
            )  # fmt: skip
        output = self.real(*args, **kwargs)
        if own["seeded"]:
            advance(own["device"])
        return output

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What code between the calls may ask for; it is a gate by ``type``."""
        own = vars(self)
        return type(own["bare"]) if "bare" in own else Gate

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

    def __setattr__(self, name: str, value: Any) -> None:
        own = vars(self)
        if "bare" in own:  # the forward tells the module something
            setattr(own["bare"] if own["find"] is None else own["find"](), name, value)
        else:
            super().__setattr__(name, value)
