"""One recorded use of parameters: what W needs to make their gradients without autograd.

A use keeps the operation's input ``x`` and gets ``dy``, the gradient of its output, from I. Its GEMMs repeat what
autograd would have called, operand for operand, so the bits are those of the unsplit backward (contract ``exact``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipex.backward.weights import Cast, Made, Target
from pipex.torch_internals import top_saved_tensors_hooks, version

torch_mm = torch.mm


class Sums:
    """Gradients of one micro-batch: one per target, summed in the order in which they are added."""

    __slots__ = ("_has_casts", "_place", "gradients", "targets")

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.gradients: list[Tensor] = []
        self._place: dict[object, int] = {}  # id of a parameter, or edge -> its place in the lists
        self._has_casts = False

    def add(self, target: Target, gradient: Tensor) -> None:
        key: object
        if isinstance(target, Cast) and gradient.dtype is not target.parameter.dtype:
            self._has_casts = True
            key = id(target.parameter), target.region
        else:
            if isinstance(target, Cast):
                target = target.parameter
            key = target.edge if isinstance(target, Made) else id(target)
            if gradient.dtype is not target.dtype:  # of an operation that autocast has run on a cast of its own
                gradient = gradient.to(target.dtype)
        place = self._place.setdefault(key, len(self.targets))
        if place == len(self.targets):
            self.targets.append(target)
            self.gradients.append(gradient)
        else:
            before = self.gradients[place]
            self.gradients[place] = gradient + before if before.is_sparse else before + gradient

    def cast_back(self) -> tuple[list[Tensor | Made], list[Tensor]]:
        """Targets and their gradients; those of casts are their parameters'."""
        if not self._has_casts:
            return self.targets, self.gradients  # type: ignore[return-value]
        whole = Sums()
        for target, gradient in zip(self.targets, self.gradients, strict=True):
            if isinstance(target, Cast):
                whole.add(target.parameter, gradient.to(target.parameter.dtype))
            else:
                whole.add(target, gradient)
        return [target for target in whole.targets if not isinstance(target, Cast)], whole.gradients


class Captor(Protocol):
    """Who a use hands its dy to: a tape; ``replays`` says that it sees a part of a forward that runs again."""

    replays: bool

    def captured(self, use: Use, dy: Tensor) -> None: ...


class Packed:
    """A tensor in the hands of whoever has put hooks on what autograd saves: a checkpoint, which makes it anew when it
    is asked for, or an offload."""

    __slots__ = ("_packed", "_unpack")

    def __init__(self, x: Tensor, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        self._packed, self._unpack = pack(x), unpack

    def unpack(self) -> Tensor:
        """Once."""
        return self._unpack(self._packed)


class Use:
    """Base of all uses; lives from the forward until W of one micro-batch.

    What W reads is set before this class's own ``__init__`` is called, in which a checkpoint's second run may end.

    Attributes:
        x: the operation's input, or what stands for it until dy comes.
        weight, bias: of a kind of use that has some: whose gradients W makes; None where frozen.
    """

    __slots__ = ("tape", "version", "x")

    def __init__(self, tape: Captor, x: Tensor) -> None:
        self.tape = tape
        self.version = version(x)
        self.x: Tensor | Packed = x
        hooks = top_saved_tensors_hooks(False)
        if hooks is not None:
            self._pack(*hooks)

    def _pack(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        assert isinstance(self.x, Tensor)
        x = self.x.detach()
        if self.tape.replays:
            x.__dict__["again"] = self  # the use of the first run gets this tensor
            pack(x)
        else:
            self.x = Packed(x, pack, unpack)

    def capture(self, dy: Tensor | None) -> None:
        """Takes dy, None where it is zero; autograd calls it in I, before it goes on to the operation's input."""
        if dy is None:
            return
        x = self.x
        if isinstance(x, Packed):
            x = x.unpack()
            self.version = version(x)
            self.made_again(x.__dict__.pop("again", None))
        self.tape.captured(self, dy)
        self.x = x.detach()  # so that no graph hangs on what the tape holds

    def made_again(self, use: Use | None) -> None:
        """Takes the use of the same operation in a checkpoint's second run. There a weight made of parameters has a
        graph whose tensors are at hand."""
        for name in ("weight", "bias"):
            target = getattr(use, name, None)
            if isinstance(target, Made):
                setattr(self, name, target)

    @property
    def held(self) -> list[Tensor]:
        """What W keeps alive besides dy."""
        return [self.input()]

    @property
    def targets(self) -> Sequence[Target] | None:
        """Whose gradients it gives, as often as it adds to each; None: not told before W."""
        return None

    def input(self) -> Tensor:
        """x, proven unchanged since the forward (autograd's own check does not run for it)."""
        x = self.x
        assert isinstance(x, Tensor), "its dy has come"
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

    def __init__(self, tape: Captor, x: Tensor, weight: Target | None, bias: Target | None) -> None:
        self.weight = weight  # None where frozen
        self.bias = bias
        super().__init__(tape, x)

    @property
    def targets(self) -> Sequence[Target]:
        return [target for target in (self.bias, self.weight) if target is not None]

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        rows, columns = dy, self.input()
        if columns.dim() > 2:
            columns = columns.flatten(0, -2)  # by reshape(-1, 0) the number of rows would be lost
        if rows.dim() > 2:
            rows = rows.flatten(0, -2)
        if self.bias is not None:
            sums.add(self.bias, rows.sum(0))
        if self.weight is not None:
            # Not by the tensor's method, which is ours as long as somebody records.
            sums.add(self.weight, torch_mm(rows.t(), columns.conj() if columns.is_complex() else columns))


class EmbeddingUse(Use):
    """y = W[x] with integer x: dW is dy scattered over the rows of W."""

    __slots__ = ("padding", "rows", "scale_by_frequency", "weight")

    def __init__(
        self, tape: Captor, x: Tensor, weight: Target, rows: int, padding: int, scale_by_frequency: bool
    ) -> None:
        self.weight = weight
        self.rows = rows  # of the weight
        self.padding = padding  # row whose gradient stays zero; -1 for none
        self.scale_by_frequency = scale_by_frequency
        super().__init__(tape, x)

    @property
    def targets(self) -> Sequence[Target]:
        return [self.weight]

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        gradient = torch.ops.aten.embedding_dense_backward(
            dy, self.input(), self.rows, self.padding, self.scale_by_frequency
        )
        sums.add(self.weight, gradient)


def as_rows(tensor: Tensor) -> Tensor:
    """As a matrix [T, C] whose rows do not overlap and have no gaps within: what the kernels read."""
    matrix = tensor if tensor.dim() == 2 else tensor.flatten(0, -2)
    by_rows = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if by_rows else matrix.contiguous()
