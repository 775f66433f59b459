"""Cuts a batch into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipex.errors import InputError


def as_tensors(value: Tensor | Sequence[Tensor], what: str) -> tuple[Tensor, ...]:
    """A tensor or a sequence of tensors as a tuple, checked.

    Raises:
        InputError: something in it is no tensor, or they disagree in their number of samples (dimension 0).
    """
    tensors = (value,) if isinstance(value, Tensor) else tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"{what} is not made of tensors", got=type(tensor).__name__, needed="a tensor or a tuple of tensors"
            )
    if any(t.dim() == 0 for t in tensors) or len({t.shape[0] for t in tensors}) > 1:
        raise InputError(
            f"the tensors of {what} have no common number of samples",
            got=f"shapes {[tuple(t.shape) for t in tensors]}", needed="the same dimension 0",
        )  # fmt: skip
    return tensors


def sizes(samples: int, microbatches: int) -> list[int]:
    """Samples of each micro-batch, largest first, differing by at most one: 10 in 4 gives 3, 3, 2, 2.

    Raises:
        InputError: fewer samples than micro-batches.
    """
    if samples < microbatches:
        raise InputError(
            "the batch is too small for the plan",
            got=f"{samples} samples for {microbatches} micro-batches", needed="at least one sample per micro-batch",
            fix="use a larger batch or a plan with fewer micro-batches",
        )  # fmt: skip
    base, larger = divmod(samples, microbatches)
    return [base + 1] * larger + [base] * (microbatches - larger)


def split(tensors: Sequence[Tensor], microbatches: int) -> list[tuple[Tensor, ...]]:
    """Cuts tensors of one number of samples along dimension 0; entry m holds those of micro-batch m.

    Raises:
        InputError: fewer samples than micro-batches.
    """
    pieces = [torch.split(t, sizes(t.shape[0], microbatches)) for t in tensors]
    return list(zip(*pieces, strict=True))
