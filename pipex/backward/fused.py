"""W where it need not have autograd's bits: into the gradients at once, and many products in one launch.

The contract ``fused``: no less accurate against float64 than autograd, and the same bits run after run. A product is
rounded once, on its way into the gradient, instead of twice; so may be the sum of several micro-batches, where nothing
comes between their W's. Layers of one shape go together (``products``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipex.backward import reductions
from pipex.backward.accumulate import Accumulator, is_plain, main_grad_of, only_adds, tell_of_main_grad
from pipex.backward.products import DTYPES, add_weight_gradients
from pipex.backward.uses import EmbeddingUse, LinearUse, Use, as_rows, torch_mm
from pipex.backward.weights import parameter_of
from pipex.torch_internals import post_accumulate_hooks
from pipex.triton_kernels.checks import OPERAND_DTYPES


class _Layer:
    """What waits to be multiplied for one layer, in rising micro-batch order."""

    __slots__ = ("bias", "dys", "weight", "xs")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.dys: list[Tensor] = []
        self.xs: list[Tensor] = []

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def form(self) -> tuple[object, ...]:
        """What layers of one launch have in common."""
        dy, gradient = self.dys[0], _gradient(self.weight)
        return self.weight.shape, self.bias is None, len(self.dys), dy.dtype, gradient.dtype, dy.device

    def begin(self) -> None:
        """A parameter without a gradient gets the first product as such."""
        if all(_gradient_or_none(parameter) is not None for parameter in self.parameters):
            return
        dy, x = self.dys.pop(0), self.xs.pop(0)
        for parameter in self.parameters:
            product = torch_mm(dy.t(), x) if parameter is self.weight else dy.sum(0)
            so_far = _gradient_or_none(parameter)
            if so_far is None:
                parameter.grad = product
            else:
                so_far += product


class _Table:
    """What waits to be added to an embedding."""

    __slots__ = ("dys", "ids", "padding", "weight")

    def __init__(self, weight: Tensor, padding: int) -> None:
        self.weight = weight
        self.padding = padding
        self.dys: list[Tensor] = []
        self.ids: list[Tensor] = []

    def add(self) -> None:
        if _gradient_or_none(self.weight) is None:
            self.weight.grad = torch.zeros_like(self.weight)
        reductions.add_embedding_gradient(self.dys, self.ids, _gradient(self.weight), self.padding)


class FusedProducts:
    """The products of a stage that W's have left to be made together.

    Args:
        accumulators: those of the stage's recorded parameters, by id.
    """

    def __init__(self, accumulators: Mapping[int, Accumulator]) -> None:
        self._accumulators = accumulators
        self._layers: dict[tuple[int, int], _Layer] = {}
        self._tables: dict[tuple[int, int], _Table] = {}

    def take(self, use: Use, dy: Tensor) -> bool:
        """Takes the gradients of a use, if they may be added as they are made; says whether it did."""
        if isinstance(use, LinearUse):
            return self._take_linear(use, dy)
        return isinstance(use, EmbeddingUse) and self._take_embedding(use, dy)

    def _take_linear(self, use: LinearUse, dy: Tensor) -> bool:
        weight, bias = parameter_of(use.weight), parameter_of(use.bias)
        if (
            (use.bias is None) != (bias is None)
            or weight is None
            or dy.dtype not in DTYPES
            or not weight.is_contiguous()
            or not self._open(weight, dy)
        ):
            return False
        if bias is not None and not (self._open(bias, dy) and _dtype(bias) is _dtype(weight)):
            return False
        layer = self._layers.setdefault((id(weight), id(bias)), _Layer(weight, bias))
        layer.dys.append(as_rows(dy))
        layer.xs.append(as_rows(use.input()))
        return True

    def _take_embedding(self, use: EmbeddingUse, dy: Tensor) -> bool:
        weight = parameter_of(use.weight)
        if weight is None or (
            not reductions.serves(dy.device)
            or use.scale_by_frequency
            or dy.dtype not in OPERAND_DTYPES
            or not weight.is_contiguous()
            or not self._open(weight, dy)
        ):
            return False
        table = self._tables.setdefault((id(weight), use.padding), _Table(weight, use.padding))
        table.dys.append(dy.reshape(-1, dy.shape[-1]).contiguous())
        table.ids.append(use.input().reshape(-1))
        return True

    def _open(self, parameter: Tensor, dy: Tensor) -> bool:
        """Whether products may be added to the parameter's gradient without anybody being told of each."""
        if not parameter.requires_grad or post_accumulate_hooks(parameter):
            return False
        gradient = main_grad_of(parameter)
        if gradient is None:
            accumulator = self._accumulators.get(id(parameter))
            if accumulator is None or not only_adds(accumulator, parameter, dy):
                return False
            gradient = parameter.grad
        return gradient is None or (
            is_plain(gradient)
            and gradient.is_contiguous()
            and gradient.device == dy.device
            and (gradient.dtype is dy.dtype or (gradient.dtype is torch.float32 and dy.dtype.itemsize < 4))
        )

    def clear(self) -> None:
        """Forgets what was taken: of a step that was not completed."""
        self._layers.clear()
        self._tables.clear()

    def add(self) -> None:
        """Makes all that was taken, in one go for layers that are alike."""
        layers, self._layers = list(self._layers.values()), {}
        tables, self._tables = list(self._tables.values()), {}
        for table in tables:
            table.add()
            tell_of_main_grad(table.weight)
        for layer in layers:
            layer.begin()
        launches: list[tuple[tuple[object, ...], set[int], list[_Layer]]] = []
        for layer in layers:
            if not layer.dys:
                continue
            form, places = layer.form, {_gradient(parameter).data_ptr() for parameter in layer.parameters}
            for other, taken, group in launches:
                if other == form and not taken & places:  # no gradient may be added to twice at a time
                    taken |= places
                    group.append(layer)
                    break
            else:
                launches.append((form, places, [layer]))
        for _, _, group in launches:
            biases = [_gradient(layer.bias) for layer in group if layer.bias is not None]
            add_weight_gradients(
                [layer.dys for layer in group],
                [layer.xs for layer in group],
                [_gradient(layer.weight) for layer in group],
                biases or None,
            )
        for layer in layers:
            for parameter in layer.parameters:
                tell_of_main_grad(parameter)


def _gradient_or_none(parameter: Tensor) -> Tensor | None:
    main = main_grad_of(parameter)
    return parameter.grad if main is None else main


def _gradient(parameter: Tensor) -> Tensor:
    gradient = _gradient_or_none(parameter)
    assert gradient is not None, "begin() has made it"
    return gradient


def _dtype(parameter: Tensor) -> torch.dtype:
    """Of its gradient."""
    gradient = _gradient_or_none(parameter)
    return parameter.dtype if gradient is None else gradient.dtype
