"""Regimes in which people train, as what becomes of a module."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipex.errors import InputError


def as_it_is(module: nn.Module) -> nn.Module:
    return module


def under_autocast(module: nn.Module) -> nn.Module:
    device = next(module.parameters()).device.type
    module.forward = torch.autocast(device, torch.bfloat16)(module.forward)
    return module


def checkpointed(module: nn.Module) -> nn.Module:
    forward = module.forward
    module.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    return module


def check(regimes: list[str], known: list[str]) -> None:
    """
    Raises:
        InputError: one of them is not known.
    """
    for regime in regimes:
        if regime not in known:
            raise InputError("not a regime", got=repr(regime), needed=f"one of {', '.join(known)}")
