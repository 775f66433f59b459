"""Whether a model's own loss is the mean that its sums and counts say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipex.errors import PipexError
from pipex.partition.own_forward.arguments import Arguments
from pipex.partition.own_forward.loss import Means, OwnLoss, loss_in

TOLERANCE = 2.0**-10
"""Of a loss in float32, relative; in fewer bits four of their units."""


def problem_with_loss(model: nn.Module, arguments: Arguments) -> str:
    """What keeps the loss of the sample from being that of its two halves together, in evaluation; nothing if it is, or
    where that cannot be said: the sample cannot be halved, or there is more in the loss than a mean."""
    if beside := _means_beside(model, arguments):
        return f"{beside} other means that it computes, and that are no part of it"
    halves = _halves(arguments.tensors)
    if halves is None:
        return ""
    with in_mode(model, training=False), torch.no_grad():
        try:
            whole, *parts = [_loss(model, arguments, tensors) for tensors in (arguments.tensors, *halves)]
        except PipexError:
            return ""  # it is said when such a loss is asked for
        except Exception:
            return ""  # half of such a batch is none
    if whole is None or None in parts:
        return ""
    value, counted = _mean([whole])
    other, also = _mean([part for part in parts if part is not None])
    if not counted or not also or _close(value, other, whole.sum.dtype):
        return ""
    return f"{value:.6g} for the sample, and {other:.6g} for its halves together"


def _means_beside(model: nn.Module, arguments: Arguments) -> int:
    args, kwargs = arguments.sample()
    with torch.enable_grad(), Means() as means:
        loss = loss_in(model(*args, **kwargs))
    return means.beside(loss) if loss is not None and loss.requires_grad else 0


def _loss(model: nn.Module, arguments: Arguments, tensors: Sequence[Tensor]) -> OwnLoss | None:
    """None where there is more in it."""
    args, kwargs = arguments.call([tensor.clone() for tensor in tensors])
    with Means() as means:
        output = model(*args, **kwargs)
    found = means.of(output)
    loss = loss_in(output)
    count = float(found.count)
    plain = loss is None or not count or _close(float(found.sum) / count, float(loss), loss.dtype)
    return found if plain and not found.others and means.whole else None


def _mean(losses: Sequence[OwnLoss]) -> tuple[float, float]:
    count = sum(float(loss.count) for loss in losses)
    return sum(float(loss.sum) for loss in losses) / (count or 1.0), count


def _close(one: float, other: float, dtype: torch.dtype) -> bool:
    return abs(one - other) <= max(TOLERANCE, 4 * torch.finfo(dtype).eps) * max(abs(one), abs(other))


def _halves(tensors: Sequence[Tensor]) -> list[list[Tensor]] | None:
    """Cut along dimension 0, as a batch is."""
    rows = {tensor.shape[0] for tensor in tensors if tensor.dim()} - {1}
    if len(rows) != 1:
        return None
    many = rows.pop()
    middle = many // 2
    if not middle:
        return None
    parts = (slice(0, middle), slice(middle, many))
    return [[t[part] if t.dim() and t.shape[0] == many else t for t in tensors] for part in parts]


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Around forwards, with all modules in training or in evaluation. Their own ``train`` is not called."""
    modes: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, before in modes:
            module.training = before
