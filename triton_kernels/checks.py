"""What a launcher checks before anything runs: shape, dtype, stride and device, in that order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pipex.errors import InputError

OPERAND_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Operand(NamedTuple):
    """A tensor, the name that its caller knows it by, and what it must be."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def check(operands: Sequence[Operand]) -> None:
    """Raises InputError at the first operand that a kernel could not read or write as it stands."""
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
    first = operands[0]
    for name, tensor, _, _ in operands:
        if tensor.device != first.tensor.device:
            raise InputError(
                f"{name} is on another device than {first.name}", got=tensor.device, needed=first.tensor.device
            )
    # Under Triton's interpreter the kernels run on the CPU, which is how they are tested without a GPU. Tensors on
    # "meta" have no memory: they are compiled for, never run on.
    allowed = ("cuda", "meta", "cpu") if triton.knobs.runtime.interpret else ("cuda", "meta")
    if first.tensor.device.type not in allowed:
        raise InputError(
            "a Triton kernel runs on a GPU", got=first.tensor.device, needed="tensors on cuda", fix="use torch"
        )


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
