"""Products of matrices, and of batches of them, with a weight on one side.

What torch takes apart (``matmul``) is taken apart here as ATen does where the
weight requires grad (aten/src/ATen/native/LinearAlgebra.cpp), so that outputs and gradients have its bits.
Formulas are those of tools/autograd/derivatives.yaml and torch/csrc/autograd/FunctionsManual.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipex.backward.recording import Recorder
from pipex.backward.uses import Captor, Sums, Use
from pipex.backward.weights import Target, Weight
from pipex.torch_internals import any_autocast, unsafe_view

torch_mm, torch_mv, torch_bmm, torch_addmm, torch_baddbmm, torch_matmul = (
    torch.mm, torch.mv, torch.bmm, torch.addmm, torch.baddbmm, torch.matmul,
)  # fmt: skip


class ProductUse(Use):
    """y = β C + α A B, where A or B is a weight, C, or C and one of them."""

    __slots__ = ("_alpha", "_beta", "_shape", "bias", "weight")

    def __init__(
        self, tape: Captor, x: Tensor, weight: Weight | None, bias: Weight | None = None, beta: Any = 1, alpha: Any = 1
    ) -> None:
        self.weight: Target | None = None if weight is None else weight.target
        self.bias: Target | None = None if bias is None else bias.target
        self._shape = None if bias is None else bias.alias.shape
        self._beta, self._alpha = beta, alpha
        super().__init__(tape, x)

    @property
    def targets(self) -> Sequence[Target]:
        return [target for target in (self.bias, self.weight) if target is not None]

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        if self.bias is not None and self._shape is not None:
            sums.add(self.bias, summed(_times(dy, self._beta), self._shape))
        if self.weight is not None:
            sums.add(self.weight, _times(self._product(dy), self._alpha))

    def _product(self, dy: Tensor) -> Tensor:
        raise NotImplementedError


class RightUse(ProductUse):
    """x W of two matrices. W may be the transpose of the target."""

    __slots__ = ("_by_columns", "_transposed")

    def __init__(self, tape: Captor, x: Tensor, weight: Weight, *added: Any, transposed: bool = False) -> None:
        alias = weight.alias.t() if transposed else weight.alias
        self._by_columns = alias.stride() == (1, alias.shape[0])
        self._transposed = transposed
        super().__init__(tape, x, weight, *added)

    def _product(self, dy: Tensor) -> Tensor:
        x, rows = self.input().conj(), dy if dy.dim() == 2 else dy.flatten(0, -2)
        found = torch_mm(rows.t(), x).t() if self._by_columns else torch_mm(x.t(), rows)
        return found.t() if self._transposed else found


class LeftUse(ProductUse):
    """W x of two matrices."""

    __slots__ = ("_by_columns",)

    def __init__(self, tape: Captor, x: Tensor, weight: Weight, *added: Any) -> None:
        self._by_columns = weight.alias.stride() == (1, weight.alias.shape[0])
        super().__init__(tape, x, weight, *added)

    def _product(self, dy: Tensor) -> Tensor:
        x = self.input().conj()
        return torch_mm(x, dy.t()).t() if self._by_columns else torch_mm(dy, x.t())


class RightBatchUse(ProductUse):
    """x W of batches of matrices."""

    def _product(self, dy: Tensor) -> Tensor:
        return torch_bmm(self.input().transpose(1, 2).conj(), dy)


class LeftBatchUse(ProductUse):
    """W x of batches of matrices."""

    def _product(self, dy: Tensor) -> Tensor:
        return torch_bmm(dy, self.input().transpose(1, 2).conj())


class VectorUse(Use):
    """y = x w of a matrix and a vector."""

    __slots__ = ("weight",)

    def __init__(self, tape: Captor, x: Tensor, weight: Weight) -> None:
        self.weight: Target = weight.target
        super().__init__(tape, x)

    @property
    def targets(self) -> Sequence[Target]:
        return [self.weight]

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        sums.add(self.weight, torch_mv(self.input().conj().t(), dy.flatten()))


class OuterUse(VectorUse):
    """y = W x of a matrix and a vector."""

    __slots__ = ()

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        sums.add(self.weight, dy.outer(self.input().conj()))


def summed(dy: Tensor, shape: torch.Size) -> Tensor:
    """Of a tensor that was broadcast from this shape. Never dy itself, which others hold."""
    return dy.clone() if dy.shape == shape else dy.sum_to_size(shape)


def _times(tensor: Tensor, factor: Any) -> Tensor:
    return tensor if factor == 1 else tensor * (factor.conjugate() if isinstance(factor, complex) else factor)


def sides(
    tape: Recorder, a: Tensor, b: Tensor, lower: bool | None = None
) -> tuple[Weight | None, Weight | None] | None:
    """The operands as weights; None where both are, or constants: what is made of them is a weight, or may be.

    Args:
        lower: whether autocast runs the operation in lower precision; None: if it is on.
    """
    lower = any_autocast() if lower is None else lower
    left, right = tape.weight(a, lower), tape.weight(b, lower)
    both = (left is not None or tape.is_constant(a)) and (right is not None or tape.is_constant(b))
    return None if both else (left, right)


def data(tape: Recorder, x: Tensor) -> Tensor:
    """An operand that is no weight, of an operation that autocast runs in lower precision."""
    return tape.cast(x) if any_autocast() else x


def mm(tape: Recorder, a: Tensor, b: Tensor) -> Tensor:
    """torch.mm."""
    return _product(tape, torch_mm, None, a, b, 1, 1)


def mv(tape: Recorder, a: Tensor, b: Tensor) -> Tensor:
    """torch.mv, which autocast of the CPU does not run in lower precision, unlike the same product as a matmul."""
    lower = any_autocast() and a.device.type != "cpu"
    left, right = (sides(tape, a, b, lower) if (a.dim(), b.dim()) == (2, 1) else None) or (None, None)
    if right is not None:
        a = data(tape, a) if lower else a
        return tape.product(VectorUse(tape, a, right), torch_mv, a, right.alias)
    if left is not None:
        b = data(tape, b) if lower else b
        return tape.product(OuterUse(tape, b, left), torch_mv, left.alias, b)
    return torch_mv(a, b)


def bmm(tape: Recorder, a: Tensor, b: Tensor) -> Tensor:
    """torch.bmm."""
    return _product(tape, torch_bmm, None, a, b, 1, 1)


def addmm(tape: Recorder, added: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """torch.addmm."""
    return _product(tape, torch_addmm, added, a, b, beta, alpha)


def baddbmm(tape: Recorder, added: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """torch.baddbmm."""
    return _product(tape, torch_baddbmm, added, a, b, beta, alpha)


_USES: dict[Callable[..., Tensor], tuple[int, type[ProductUse], type[ProductUse]]] = {
    torch_mm: (2, LeftUse, RightUse),
    torch_addmm: (2, LeftUse, RightUse),
    torch_bmm: (3, LeftBatchUse, RightBatchUse),
    torch_baddbmm: (3, LeftBatchUse, RightBatchUse),
}
"""By operation: of how many dimensions its factors are, and what is recorded of a weight on the left and right."""


def _product(
    tape: Recorder, run: Callable[..., Tensor], added: Tensor | None, a: Tensor, b: Tensor, beta: Any, alpha: Any
) -> Tensor:
    dimensions, left_use, right_use = _USES[run]
    weights = sides(tape, a, b) if a.dim() == b.dim() == dimensions else None
    bias = None if added is None or weights is None else tape.weight(added, any_autocast())
    factors = {} if (beta, alpha) == (1, 1) else {"beta": beta, "alpha": alpha}
    left, right = weights or (None, None)
    if left is None and right is None and bias is None:
        return run(a, b) if added is None else run(added, a, b, **factors)
    use: ProductUse
    if right is not None:
        a = data(tape, a)
        use, b = right_use(tape, a, right, bias, beta, alpha), right.alias
    elif left is not None:
        b = data(tape, b)
        use, a = left_use(tape, b, left, bias, beta, alpha), left.alias
    else:
        a, b = data(tape, a), data(tape, b)
        use = ProductUse(tape, a.new_empty(0), None, bias, beta, alpha)
    if added is None:
        return tape.product(use, run, a, b)
    added = data(tape, added) if bias is None else bias.alias
    return tape.product(use, lambda *operands: run(*operands, **factors), added, a, b)


def matmul(tape: Recorder, a: Tensor, b: Tensor) -> Tensor:
    """torch.matmul."""
    if a.dim() == b.dim() == 2:
        return mm(tape, a, b)
    if a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0]:
        return bmm(tape, a, b)
    left, right = sides(tape, a, b) or (None, None)
    if right is not None and b.dim() == 2 and a.dim() > 2:
        return _folded(tape, data(tape, a), right, transposed=False)
    if left is not None and a.dim() == 2 and b.dim() > 2:
        return _folded(tape, data(tape, b).mT, left, transposed=True).mT.contiguous()
    if right is not None and b.dim() == 1 and a.dim() > 1:
        rows, shape = data(tape, a), a.shape[:-1]
        rows = rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])

        def run(rows: Tensor, w: Tensor) -> Tensor:
            y = torch_mv(rows, w.to(rows.dtype))
            return y if len(shape) == 1 else unsafe_view(y, shape)

        return tape.product(VectorUse(tape, rows, right), run, rows, right.alias)
    if left is not None and a.dim() == 2 and b.dim() == 1:
        b = data(tape, b)
        return tape.product(OuterUse(tape, b, left), torch_mv, left.alias.to(b.dtype), b)
    if right is not None and a.dim() == 1 and b.dim() == 2:
        return mm(tape, a.unsqueeze(0), b).squeeze_(0)
    if (left is None and right is None) or a.dim() < 2 or b.dim() < 2 or not _batches_fit(a, b):
        return torch_matmul(a, b)
    # torch takes a batch of one matrix for a matrix, if that requires grad; autocast casts before it broadcasts.
    if (a.dim() == b.dim() == 3 and b.shape[0] == 1) or any_autocast():
        return torch_matmul(a, b)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    y = bmm(tape, *(t.expand(*batch, *t.shape[-2:]).reshape(batch.numel(), *t.shape[-2:]) for t in (a, b)))
    return unsafe_view(y, (*batch, a.shape[-2], b.shape[-1]))


def _batches_fit(a: Tensor, b: Tensor) -> bool:
    """Whether batches of matrices can be multiplied; torch says why not."""
    batches = zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]), strict=False)
    return a.shape[-1] == b.shape[-2] and all(m == n or 1 in (m, n) for m, n in batches)


def _folded(tape: Recorder, x: Tensor, weight: Weight, transposed: bool) -> Tensor:
    """x W, or x Wᵀ, of a batch of matrices x, made one matrix."""
    rows, shape = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    use = RightUse(tape, rows, weight, transposed=transposed)
    alias = weight.alias.t() if transposed else weight.alias
    return tape.product(use, lambda rows, w: unsafe_view(torch_mm(rows, w), (*shape, w.shape[1])), rows, alias)
