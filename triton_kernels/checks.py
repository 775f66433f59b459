"""What is checked before anything runs: shape, dtype, stride and device, in that order.

It needs no Triton, so that torch in a kernel's place takes the same operands and refuses the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipex.errors import InputError

OPERAND_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")

MicroBatches = list[tuple[Tensor, Tensor]]  # (dY, X) of each


class Operand(NamedTuple):
    """A tensor, the name that its caller knows it by, and what it must be."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def check(operands: Sequence[Operand]) -> None:
    """Raises InputError at the first operand that a kernel could not read or write as it stands, on whatever device."""
    device = operands[0].tensor.device
    if all(
        tensor.shape == shape and tensor.dtype in dtypes and tensor.is_contiguous() and tensor.device == device
        for _, tensor, shape, dtypes in operands
    ):
        return  # what nearly always holds, asked in a fifth of the time
    for name, tensor, shape, _ in operands:
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has another shape than the rest asks for", got=tuple(tensor.shape), needed=shape)
    for name, tensor, _, dtypes in operands:
        if tensor.dtype not in dtypes:
            raise InputError(
                f"{name} has another dtype", got=tensor.dtype, needed=" or ".join(str(d) for d in dtypes), fix="cast it"
            )
    for name, tensor, _, _ in operands:
        if not _lies_by_rows(tensor):
            raise InputError(
                f"{name} does not lie row by row",
                got=f"strides {tensor.stride()}",
                needed="elements of a row side by side, and rows that do not overlap",
                fix="call .contiguous() on it",
            )
    for name, tensor, _, _ in operands:
        if tensor.device != device:
            raise InputError(f"{name} is on another device than {operands[0].name}", got=tensor.device, needed=device)


def check_weight_gradients(
    dys: Sequence[Tensor | Sequence[Tensor]],
    xs: Sequence[Tensor | Sequence[Tensor]],
    weight_grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor] | None,
    dtypes: tuple[torch.dtype, ...] = OPERAND_DTYPES,
) -> list[MicroBatches]:
    """Checks the operands of ``grouped_weight_gradient``; returns the micro-batches of each layer.

    Raises:
        InputError: where a number of layers or micro-batches, a shape, dtype, stride or device does not fit.
    """
    counts = [len(dys), len(xs), len(weight_grads), len(weight_grads if bias_grads is None else bias_grads)]
    if len(set(counts)) != 1:
        raise InputError(
            "dys, xs, weight_grads and bias_grads have different lengths", got=counts, needed="one per layer"
        )
    groups = [_pairs(dy, x) for dy, x in zip(dys, xs, strict=True)]
    if not weight_grads:
        return groups
    if weight_grads[0].dim() != 2:
        raise InputError("weight_grad is a matrix", got=tuple(weight_grads[0].shape), needed="[N, K]")
    n, k = weight_grads[0].shape
    first = next((group[0][0] for group in groups if group), weight_grads[0])
    dtype = first.dtype
    gradient_dtypes = (torch.float32, dtype) if dtype.itemsize < 4 else (dtype,)
    operands = [Operand("weight_grad", weight_grads[0], (n, k), gradient_dtypes)]
    operands += [Operand("weight_grad", other, (n, k), (weight_grads[0].dtype,)) for other in weight_grads[1:]]
    operands += [Operand("bias_grad", bias, (n,), (weight_grads[0].dtype,)) for bias in bias_grads or ()]
    for group in groups:
        for m, (dy, x) in enumerate(group):
            rows = dy.shape[0] if dy.dim() else 0
            operands.append(Operand(f"dys[{m}]", dy, (rows, n), dtypes if dy is first else (dtype,)))
            operands.append(Operand(f"xs[{m}]", x, (rows, k), (dtype,)))
    check(operands)
    return groups


def check_activation(activation: str | None, z: Tensor | None) -> None:
    """
    Raises:
        InputError: no such activation, or one without its input.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError("unknown activation", got=repr(activation), needed=" or ".join(map(repr, ACTIVATIONS)))
    if (activation is None) != (z is None):
        raise InputError(
            "an activation's gradient needs the activation's input",
            got=f"activation {activation!r} {'without' if z is None else 'with'} z",
            needed="both or none",
        )


def check_input_gradient(
    dy: Tensor,
    weight: Tensor,
    saved: Mapping[str, Tensor],
    out: Sequence[Tensor] = (),
    dtypes: tuple[torch.dtype, ...] = OPERAND_DTYPES,
) -> None:
    """Checks the operands of ``input_gradient`` and ``swiglu_input_gradient``; ``saved`` by their names.

    Raises:
        InputError: where a shape, dtype, stride or device does not fit.
    """
    if dy.dim() != 2 or weight.dim() != 2:
        raise InputError(
            "dy and weight are matrices",
            got=f"{tuple(dy.shape)} and {tuple(weight.shape)}",
            needed="[T, N] and [N, K]",
            fix="flatten the leading dimensions",
        )
    (t, n), k = dy.shape, weight.shape[1]
    same = (dy.dtype,)
    check(
        [Operand("dy", dy, (t, n), dtypes), Operand("weight", weight, (n, k), same)]
        + [Operand(name, tensor, (t, k), same) for name, tensor in saved.items()]
        + [Operand("out", tensor, (t, k), same) for tensor in out]
    )


def _pairs(dys: Tensor | Sequence[Tensor], xs: Tensor | Sequence[Tensor]) -> MicroBatches:
    if len(dys) != len(xs):
        raise InputError(
            "dys and xs have different lengths", got=f"{len(dys)} and {len(xs)}", needed="one per micro-batch"
        )
    return list(zip(dys, xs, strict=True))


def _lies_by_rows(tensor: Tensor) -> bool:
    """Whether elements of a row are neighbours and rows, which may lie apart, do not overlap."""
    if tensor.numel() == 0:
        return True
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    reach = 1  # elements from the first to behind the last of what the dimensions so far span
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size > 1 and stride < reach:
            return False
        reach = max(reach, size * stride if size > 1 else 1)
    return True
