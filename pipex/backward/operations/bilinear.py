"""Bilinear layers: y_k = x₁ W_k x₂ + b_k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipex.backward.recording import Recorder
from pipex.backward.uses import Captor, Sums, Use
from pipex.backward.weights import Target, Weight
from pipex.torch_internals import top_saved_tensors_hooks, trilinear

torch_bilinear = torch.bilinear

# Of the dimensions (rows, outputs, in of x₁, in of x₂), those that each operand lacks.
_LEFT, _WEIGHT, _RIGHT, _OUTPUT = [1, 3], [0], [1, 2], [2, 3]


class BilinearUse(Use):
    """The product, of x₁ [rows, in] and x₂ [rows, other in]; dW as the operation's own backward makes it."""

    __slots__ = ("_other", "weight")

    def __init__(self, tape: Captor, x: Tensor, other: Tensor, weight: Weight) -> None:
        self.weight: Target = weight.target
        self._other = Use(tape, other.detach())  # which sees changes in place
        super().__init__(tape, x)

    @property
    def held(self) -> list[Tensor]:
        return [self.input(), self._other.input()]

    @property
    def targets(self) -> Sequence[Target]:
        return [self.weight]

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        sums.add(self.weight, trilinear(self.input(), dy, self._other.input(), _LEFT, _OUTPUT, _RIGHT, _WEIGHT))


def bilinear(tape: Recorder, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.bilinear. A checkpoint, which would have to make two inputs anew, is left to I, as the bias is."""
    fits = a.dim() == b.dim() > 0 and weight.dim() == 3 and (*a.shape, b.shape[-1]) == (
        *b.shape[:-1], *weight.shape[1:]
    )  # fmt: skip
    one_type = a.dtype is b.dtype is weight.dtype  # autocast would cast them
    w = tape.weight(weight) if fits and one_type and top_saved_tensors_hooks(False) is None else None
    if w is None:
        return torch_bilinear(a, b, weight, bias)
    left, right = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])

    def run(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
        return trilinear(left, weight, right, _LEFT, _WEIGHT, _RIGHT, _OUTPUT)

    y = tape.product(BilinearUse(tape, left, right, w), run, left, right, w.alias)
    y = y.reshape(*a.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias
