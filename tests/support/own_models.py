"""Models with modules that make their weight gradients themselves, and the same that do so within the backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from delayed_linear import DelayedLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class Mixed(nn.Module):
    """One twice, and its weight in a plain operation between; around it layers that are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.own, self.outlet = nn.Linear(WIDTH, WIDTH), DelayedLinear(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.own(self.inlet(x)))
        x = torch.tanh(F.linear(x, self.own.weight))
        return self.outlet(self.own(x))


class Checkpointed(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


class Named(nn.Module):
    """What it returns holds its input, which somebody made before it, and two outputs of one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.own = DelayedLinear(WIDTH)
        self.inlet = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        found = self.own(x)
        return found["y"].mul_(2) + found["parts"][0]


class SeveralOutputs(DelayedLinear):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"y": y * 1.5, "parts": (x, [y.tanh()]), "none": None}


def alone() -> nn.Module:
    return DelayedLinear(WIDTH)


def several_outputs() -> nn.Module:
    module = Named()
    module.own = SeveralOutputs(WIDTH)
    return module


MODELS = {"mixed": Mixed, "alone": alone, "checkpointed": Checkpointed, "several outputs": several_outputs}


def owned(module: nn.Module) -> list[DelayedLinear]:
    return [part for part in module.modules() if isinstance(part, DelayedLinear)]


def twins(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model, and the same whose modules leave nothing."""
    torch.manual_seed(0)
    model = build()
    whole = copy.deepcopy(model)
    for part in owned(whole):
        part.delayed = False
    return model, whole


def micro_batch(number: int, *, needs_gradient: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x, dy = torch.randn(2, 4, WIDTH, generator=generator)
    return x.requires_grad_(needs_gradient), dy


def assert_as_whole(model: nn.Module, whole: nn.Module) -> None:
    for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if reference.grad is not None:
            assert torch.equal(parameter.grad, reference.grad), name
    assert not any(part.queue for part in owned(model)), "nothing is left"
    for part in owned(model):
        assert "forward" not in vars(part), "the module is as it was"
