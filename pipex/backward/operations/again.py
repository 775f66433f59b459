"""Operations whose weight gradients W makes by running them once more: any, at the price of another forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipex.backward.uses import Captor, Sums, Use
from pipex.backward.weights import Target, Weight
from pipex.torch_internals import base


class AgainUse(Use):
    """y = run(x, *weights): W differentiates it with regard to the weights alone.

    Args:
        run: the operation, as torch has it.
        weights: its other operands.
    """

    __slots__ = ("_run", "_weights")

    def __init__(self, tape: Captor, x: Tensor, run: Callable[..., Tensor], weights: Sequence[Weight]) -> None:
        self._run, self._weights = run, weights
        super().__init__(tape, x)

    @property
    def held(self) -> list[Tensor]:
        return [self.input(), *(weight.alias for weight in self._weights)]

    @property
    def targets(self) -> Sequence[Target]:
        return [weight.target for weight in self._weights]

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        with torch.enable_grad():
            leaves = [weight.alias.detach().requires_grad_() for weight in self._weights]
            y = self._run(self.input(), *leaves)
        product = base(y)
        if product is not None:  # dy is that of what it is a view of
            y = product
        for weight, gradient in zip(self._weights, torch.autograd.grad(y, leaves, dy), strict=True):
            sums.add(weight.target, gradient)
