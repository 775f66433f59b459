"""Autocast around a step: for its forwards and losses, as torch recommends it, and not for their backwards.

A backward under autocast casts again what a part of the model has kept out of it (``autocast(enabled=False)``). And
what autocast has cast once it keeps as long as it is on, past an update that makes other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar, TypeVarTuple

import torch

from pipex.torch_internals import any_autocast

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")

_KINDS = ("cpu", "cuda")


def as_recorded(run: Callable[[*_Arguments], _Result], *args: *_Arguments) -> _Result:
    """Runs a backward with autocast off: its operations are those that the forward has recorded."""
    with ExitStack() as off:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        return run(*args)


def forget_casts() -> None:
    """Called before the forwards of a step or evaluation: parameters may have changed, and without a graph autocast
    keeps casts without one."""
    if any_autocast():
        torch.clear_autocast_cache()
