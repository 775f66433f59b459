"""Roots: where the graph of a stage begins, if its input does not require grad (stage 0: tokens, or raw features)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipex.backward.uses import Use
from pipex.torch_internals import is_view

anchor = torch.zeros((), requires_grad=True)
"""Something that requires grad, so that the output does."""


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, use: Use, run: Callable[[], Tensor], anchor: Tensor) -> Tensor:
        ctx.use = use
        y = run()
        # A view may not be changed in place outside of the Function that made it, and users do that (inplace ReLU).
        return y.clone() if is_view(y) else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        ctx.use.capture(dy)
        return None, None, None


class _Anchored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None) -> tuple[None, None]:
        return None, None


def anchored(x: Tensor) -> Tensor:
    """An input that requires no grad, for an operation that takes its own gradient on its way but needs a graph."""
    y: Tensor = _Anchored.apply(x, anchor)  # type: ignore[no-untyped-call]
    return y


def rooted(use: Use, run: Callable[[], Tensor]) -> Tensor:
    """The output of ``run``, with a place in the graph at which ``use`` gets its dy and the backward ends."""
    y: Tensor = _Root.apply(use, run, anchor)  # type: ignore[no-untyped-call]
    return y
