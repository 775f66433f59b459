"""Convolutions of one to three dimensions, and transposed ones, of a batch, with padding in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipex.backward.operations.matmul import data
from pipex.backward.recording import Recorder
from pipex.backward.uses import Captor, Sums, Use
from pipex.backward.weights import Target, Weight
from pipex.torch_internals import any_autocast


class Form(NamedTuple):
    """The numbers of a convolution, one per dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class ConvolutionUse(Use):
    """y = x * W + b; the backend's own backward, for weight and bias alone."""

    __slots__ = ("_alias", "_bias_shape", "_form", "bias", "weight")

    def __init__(self, tape: Captor, x: Tensor, weight: Weight, bias: Weight | None, form: Form) -> None:
        self.weight: Target = weight.target
        self.bias: Target | None = None if bias is None else bias.target
        self._alias = weight.alias
        self._bias_shape = None if bias is None else list(bias.alias.shape)
        self._form = form
        super().__init__(tape, x)

    @property
    def held(self) -> list[Tensor]:
        return [self.input(), self._alias]

    @property
    def targets(self) -> Sequence[Target]:
        return [self.weight] if self.bias is None else [self.bias, self.weight]

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        x, mask = self.input(), [False, True, self.bias is not None]
        _, weight, bias = torch.ops.aten.convolution_backward(
            dy, x, self._alias.to(x.dtype), self._bias_shape, *self._form, mask
        )
        if self.bias is not None:
            sums.add(self.bias, bias)
        sums.add(self.weight, weight)


def convolution(run: Callable[..., Tensor], dimensions: int, transposed: bool) -> Callable[..., Tensor]:
    """What stands for one of torch's functions."""

    def convolve(
        tape: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *others: Any
    ) -> Tensor:
        lower = any_autocast()
        # Of complex numbers it is made of several.
        one = not isinstance(padding, str) and x.dim() == dimensions + 2 and not x.is_complex()
        w, b = (tape.weight(weight, lower), tape.weight(bias, lower)) if one else (None, None)
        if w is None or (b is None) != (bias is None):
            return run(x, weight, bias, stride, padding, *others)
        output_padding, groups, dilation = others if transposed else (0, others[1], others[0])
        form = Form(
            _each(stride, dimensions),
            _each(padding, dimensions),
            _each(dilation, dimensions),
            transposed,
            _each(output_padding, dimensions),
            groups,
        )
        x = data(tape, x)
        use = ConvolutionUse(tape, x, w, b, form)
        return tape.product(use, run, x, w.alias, None if b is None else b.alias, stride, padding, *others)

    return convolve


def _each(number: int | Sequence[int], dimensions: int) -> list[int]:
    numbers = [number] if isinstance(number, int) else list(number)
    return numbers * dimensions if len(numbers) == 1 else numbers
