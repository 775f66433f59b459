"""One recorded use of parameters: what W needs to make their gradients without autograd.

A use keeps the operation's input ``x`` and gets ``dy``, the gradient of its output, from I. Its GEMMs repeat what
autograd would have called, operand for operand, so the bits are those of the unsplit backward (contract ``exact``).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pipex.torch_internals import version


class Sums:
    """Gradients of one micro-batch: one per parameter, summed in the order in which they are added."""

    __slots__ = ("_place", "gradients", "parameters")

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._place: dict[int, int] = {}  # id of a parameter -> its place in the lists

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        place = self._place.setdefault(id(parameter), len(self.parameters))
        if place == len(self.parameters):
            self.parameters.append(parameter)
            self.gradients.append(gradient)
        else:
            before = self.gradients[place]
            self.gradients[place] = gradient + before if before.is_sparse else before + gradient


class Captor(Protocol):
    """Who a use hands its dy to: a tape."""

    def captured(self, use: Use, dy: Tensor) -> None: ...


class Use:
    """Base of all uses; lives from the forward until W of one micro-batch."""

    __slots__ = ("tape", "version", "x")

    def __init__(self, tape: Captor, x: Tensor) -> None:
        self.tape = tape
        self.x = x
        self.version = version(x)

    def capture(self, dy: Tensor | None) -> None:
        """Takes dy, None where it is zero; autograd calls it in I, before it goes on to the operation's input."""
        if dy is not None:
            self.tape.captured(self, dy)
            self.x = self.x.detach()  # so that no graph hangs on what the tape holds

    def input(self) -> Tensor:
        """x, proven unchanged since the forward (autograd's own check does not run for it)."""
        x = self.x
        if version(x) != self.version:
            raise RuntimeError(
                f"the input of an operation with deferred weight gradient was modified in place after the forward; "
                f"got version {version(x)} of a tensor of shape {tuple(x.shape)}, needed version {self.version}; "
                f"use an out-of-place operation there"
            )
        return x

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        """Adds the gradients of this use to the sums."""
        raise NotImplementedError


class LinearUse(Use):
    """y = x Wᵀ + b with contiguous x of shape (..., in): dW = dyᵀ x of shape (out, in), db = Σ dy of shape (out).

    dy comes in the shape of the product, (rows, out), or of y.
    """

    __slots__ = ("bias", "weight")

    def __init__(self, tape: Captor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.tape, self.x, self.version = tape, x, version(x)  # not by super(): there is one of these per operation
        self.weight = weight  # None where frozen
        self.bias = bias

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        rows, columns = dy, self.input()
        if columns.dim() > 2:
            columns = columns.flatten(0, -2)  # by reshape(-1, 0) the number of rows would be lost
        if rows.dim() > 2:
            rows = rows.flatten(0, -2)
        if self.bias is not None:
            sums.add(self.bias, rows.sum(0))
        if self.weight is not None:
            sums.add(self.weight, rows.t().mm(columns.conj() if columns.is_complex() else columns))


class EmbeddingUse(Use):
    """y = W[x] with integer x: dW is dy scattered over the rows of W."""

    __slots__ = ("padding", "scale_by_frequency", "weight")

    def __init__(self, tape: Captor, x: Tensor, weight: Tensor, padding: int, scale_by_frequency: bool) -> None:
        super().__init__(tape, x)
        self.weight = weight
        self.padding = padding  # row whose gradient stays zero; -1 for none
        self.scale_by_frequency = scale_by_frequency

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        gradient = torch.ops.aten.embedding_dense_backward(
            dy, self.input(), self.weight.shape[0], self.padding, self.scale_by_frequency
        )
        sums.add(self.weight, gradient)


def as_rows(tensor: Tensor) -> Tensor:
    """As a matrix [T, C] whose rows do not overlap and have no gaps within: what the kernels read."""
    matrix = tensor if tensor.dim() == 2 else tensor.flatten(0, -2)
    by_rows = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if by_rows else matrix.contiguous()
