"""Recorded operations other than plain linear layers and embeddings, by family, and where torch has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipex.backward.dtensor import tape_for_dtensors
from pipex.backward.operations.bilinear import bilinear, torch_bilinear
from pipex.backward.operations.convolution import convolution
from pipex.backward.operations.einsum import einsum, torch_einsum
from pipex.backward.operations.experts import grouped_mm
from pipex.backward.operations.linear import linear
from pipex.backward.operations.matmul import addmm, baddbmm, bmm, matmul, mm, mv
from pipex.backward.recording import Recorder, clear_autocast_cache, is_open, tape_for, torch_embedding, torch_linear
from pipex.backward.uses import EmbeddingUse
from pipex.torch_internals import GROUPED_MM
from pipex.torch_internals import grouped_mm as torch_grouped_mm

Function = Callable[..., Any]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tape = tape_for(input)
    if tape is None:
        if type(input) is not Tensor:
            tape = tape_for_dtensors(input, weight, bias)
        if tape is None or isinstance(input, nn.Parameter):
            return torch_linear(input, weight, bias)
    return linear(tape, input, weight, bias)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    tape = tape_for(input)
    if tape is None and type(input) is not Tensor:
        tape = tape_for_dtensors(input, weight)
    if tape is None or sparse or max_norm is not None:
        return torch_embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    w = tape.weight(weight)
    if w is None:
        return torch_embedding(input, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    rows = weight.shape[0]
    padding = -1 if padding_idx is None else padding_idx % rows
    use = EmbeddingUse(tape, input, w.target, rows, padding, scale_grad_by_freq)
    return tape.product(use, torch_embedding, input, w.alias, padding_idx)


def _tape_for(*operands: Any) -> Recorder | None:
    """The same for operands of which any may be a parameter; or all of them DTensors."""
    if not is_open():
        return None
    if not all(type(operand) in _PLAIN for operand in operands):
        return tape_for_dtensors(*operands)
    data = next((operand for operand in operands if type(operand) is Tensor), None)
    return None if data is None else tape_for(data)


_PLAIN = {Tensor, nn.Parameter}


def _product(original: Function, record: Function, operands: int) -> Function:
    """In the place of a function, or method, of so many tensors, and of factors by name."""

    def recorded(*args: Any, **factors: Any) -> Any:
        if len(args) == operands and factors.keys() <= _FACTORS:
            tape = _tape_for(*args)
            if tape is not None and not any(isinstance(factor, Tensor) for factor in factors.values()):
                return record(tape, *args, **factors)
        return original(*args, **factors)

    return named_as(original, recorded)


def named_as(original: Function, replacement: Function) -> Function:
    """torch's compiler files what it finds in the place of a function under its name."""
    replacement.__name__ = original.__name__
    return replacement


_FACTORS = {"beta", "alpha"}
_PRODUCTS: dict[str, tuple[Function, int]] = {
    "mm": (mm, 2), "mv": (mv, 2), "bmm": (bmm, 2), "matmul": (matmul, 2), "addmm": (addmm, 3), "baddbmm": (baddbmm, 3),
}  # fmt: skip


def _einsum(*args: Any) -> Any:
    if len(args) == 3 and isinstance(args[0], str):
        tape = _tape_for(*args[1:])
        if tape is not None:
            return einsum(tape, *args)
    return torch_einsum(*args)


def _grouped_mm(
    mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Any:
    tape = _tape_for(mat_a, mat_b) if bias is None and out_dtype is None else None
    if tape is None:
        return torch_grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    return grouped_mm(tape, mat_a, mat_b, offs)


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tape = _tape_for(input1, input2)
    return (
        torch_bilinear(input1, input2, weight, bias) if tape is None else bilinear(tape, input1, input2, weight, bias)
    )


def _convolution(original: Function, dimensions: int) -> Function:
    record = convolution(original, dimensions, transposed=False)

    def recorded(
        input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Any:  # fmt: skip
        tape = tape_for(input)
        if tape is None:
            return original(input, weight, bias, stride, padding, dilation, groups)
        return record(tape, input, weight, bias, stride, padding, dilation, groups)

    return named_as(original, recorded)


def _transposed(original: Function, dimensions: int) -> Function:
    record = convolution(original, dimensions, transposed=True)

    def recorded(
        input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        tape = tape_for(input)
        if tape is None:
            return original(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return record(tape, input, weight, bias, stride, padding, output_padding, groups, dilation)

    return named_as(original, recorded)


_CONVOLUTIONS = {
    **{f"conv{n}d": _convolution(getattr(torch, f"conv{n}d"), n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _transposed(getattr(torch, f"conv_transpose{n}d"), n) for n in (1, 2, 3)},
}

FUNCTIONS: dict[str, dict[str, Function]] = {
    torch.__name__: {
        **{name: _product(getattr(torch, name), *how) for name, how in _PRODUCTS.items()},
        **_CONVOLUTIONS,
        "einsum": _einsum,
        "bilinear": _bilinear,
        GROUPED_MM: _grouped_mm,
        "clear_autocast_cache": clear_autocast_cache,
    },
    F.__name__: {
        "linear": _linear,
        "embedding": _embedding,
        **_CONVOLUTIONS,
        "bilinear": _bilinear,
    },
}
"""By module and name."""

METHODS: dict[str, Function] = {
    **{name: _product(getattr(Tensor, name), *how) for name, how in _PRODUCTS.items()},
    "__matmul__": _product(Tensor.__matmul__, matmul, 2),
}
"""Of tensors, by name."""
