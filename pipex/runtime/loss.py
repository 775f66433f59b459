"""What a loss function may return, and what becomes of it.

A mean: the loss of a micro-batch; it counts with the micro-batch's share of the batch's samples.
A sum and a count: both are added up over all micro-batches, and gradients and loss are those of sum ÷ count. The count
is complete only after the last forward. So, unless the step was told it (``total``), the backward runs on the sums, and
the gradients are divided once, when all of them are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isclose, isfinite
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipex.errors import InputError
from pipex.partition.own_forward.loss import OwnLoss, own_loss

LossFunction = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor | float] | OwnLoss]


@dataclass(frozen=True, slots=True)
class MicroLoss:
    """The loss of one micro-batch.

    Attributes:
        value: the mean times the micro-batch's share, or the sum; without a graph.
        count: what the sum is to be divided by; None of a mean.
        others: as of ``OwnLoss``.
    """

    value: Tensor
    count: Tensor | float | None
    others: tuple[Tensor | float, ...] = ()


class Share(NamedTuple):
    """What a micro-batch contributes, by its samples.

    Attributes:
        loss: to the loss of the step.
        gradient: to the gradients of its update; the same in a step with one update.
    """

    loss: float
    gradient: float


def shares_of(samples: Sequence[int], groups: Sequence[range]) -> list[Share]:
    """Of micro-batches of so many samples, with an update for each group of them."""
    whole = sum(samples)
    parts = [sum(samples[m] for m in group) for group in groups]
    return [
        Share(samples[m] / whole, samples[m] / part) for group, part in zip(groups, parts, strict=True) for m in group
    ]


class Loss:
    """The loss function of a pipeline's last stage.

    Args:
        function: (output, target) of a micro-batch -> mean, or (sum, count).
        scale: applied to what the backward starts from.
        means_only: whether sums with counts are refused.
        around: each of its calls.
    """

    def __init__(
        self, function: LossFunction, scale: Callable[[Tensor], Tensor] | None = None, *, means_only: bool = False,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        self.function, self._scale = function, scale
        self.is_models = function is own_loss
        """whether the model makes it itself"""
        self.trains = False
        """whether anything in the pipeline is to be trained in this step, so that a loss must have a graph"""
        self._means_only, self._around = means_only, around
        self.total: float | None = None
        """of this step, if it was told: then sums are divided by it before their backward"""

    def __call__(self, output: Any, target: Any, share: Share) -> tuple[Tensor, MicroLoss]:
        """Where the backward of a micro-batch starts, and its loss.

        Raises:
            InputError: the function returned something else, or a loss that nothing can be trained by.
        """
        with self._around():
            returned = self.function(output, target)
        count: Tensor | float | None = None
        others: tuple[Tensor | float, ...] = ()
        if isinstance(returned, OwnLoss):
            loss, count, others, usable = returned.sum, returned.count, returned.others, True
        elif isinstance(returned, tuple):
            loss, count = returned if len(returned) == 2 else (None, None)
            usable = _is_scalar(count) or (isinstance(count, (int, float)) and not isinstance(count, bool))
        else:
            loss, usable = returned, True
        if not (usable and isinstance(loss, Tensor) and _is_scalar(loss)):
            raise InputError(
                "the loss function must return the mean loss of a micro-batch, or its sum and count",
                got=_words(returned), needed="a real tensor with one element, or such a tensor and a number",
                fix="reduce it with .mean(), or return (losses.sum(), number of losses)",
            )  # fmt: skip
        if self.total is not None and count is None:
            raise InputError("total= is what sums are divided by", got="a loss function that returns a mean",
                             needed="one that returns (sum, count)")  # fmt: skip
        root = value = loss.reshape(()) if loss.dim() else loss
        if count is None:
            root = value * share.gradient
            value = root if share.loss == share.gradient else value * share.loss
        elif self._means_only:
            raise InputError("weights that change within a step need the mean loss of a micro-batch",
                             got="a sum and a count, which other ranks would learn too late", needed="a mean",
                             fix="divide the sum by the count in the loss function")  # fmt: skip
        elif self.total is not None:
            root = value / self.total
        if torch.is_grad_enabled():
            if not root.requires_grad and self.trains:
                raise InputError(
                    "the loss does not depend on anything that is trained", got="a loss without a graph",
                    needed="one that autograd can differentiate",
                    fix="look for detach(), item(), argmax or no_grad between the parameters and the loss",
                )  # fmt: skip
            if self._scale is not None:
                root = self._scale(root)
        return root, MicroLoss(value.detach(), count, others)


class BatchLoss(NamedTuple):
    """The loss of a batch.

    Attributes:
        mean: of all micro-batches.
        divisor: what the gradients are still to be divided by, if they are those of a sum.
        counts: of each mean that the sums are of; nothing of means.
    """

    mean: float
    divisor: float | None
    counts: Sequence[float]


def of_batch(losses: Sequence[MicroLoss], total: float | None) -> BatchLoss:
    """The losses added up in the order given.

    Raises:
        InputError: some are means and some are sums, or a count is negative or not finite, or the model's own loss is
            of several means, and these cannot be weighed as one.
    """
    counts = [loss.count for loss in losses if loss.count is not None]
    if counts and len(counts) != len(losses):
        raise InputError("the loss function returned a mean for one micro-batch and a sum for another",
                         got=f"{len(counts)} sums in {len(losses)} losses", needed="one or the other")  # fmt: skip
    value, *rest = (loss.value for loss in losses)
    for other in rest:
        value = value + other
    if not counts:
        return BatchLoss(value.item(), None, ())
    rows = [[float(count) for count in (own, *loss.others)] for own, loss in zip(counts, losses, strict=True)]
    if not all(isfinite(number) and number >= 0 for row in rows for number in row):
        raise InputError("the loss function returned a count that counts nothing", got=[number for number, *_ in rows],
                         needed="finite numbers from 0")  # fmt: skip
    if problem := disproportion(rows):
        raise problem
    sums = [sum(column) for column in zip(*rows, strict=True)]
    if total is not None:
        return BatchLoss((value / total).item(), None, sums)
    return BatchLoss((value / sums[0]).item(), sums[0], sums)


def disproportion(rows: Sequence[Sequence[float]]) -> InputError | None:
    """Why losses of several means are not one mean over all of them, if they are not.

    Args:
        rows: of each loss how much each of its means has counted. With counts in the same proportion everywhere, the
            loss that weighs by one of them is that of all means over everything.
    """
    sums = [sum(column) for column in zip(*rows, strict=False)]
    if all(len(row) == len(sums) for row in rows) and all(
        isclose(count * sums[0], row[0] * its, rel_tol=1e-6)  # sums of weights are rounded
        for row in rows for count, its in zip(row, sums, strict=True)
    ):  # fmt: skip
        return None
    return InputError(
        "the model's own loss consists of several means, and how much each of them counts differs",
        got=f"means of {', '.join('/'.join(f'{count:g}' for count in row) for row in rows)} losses",
        needed="counts in one proportion in all micro-batches",
        fix="pass a loss_fn that returns (sum, count); or, if each micro-batch is to weigh by its samples, "
        "loss_fn=lambda output, target: output.loss, and the labels as the target too",
    )  # fmt: skip


Said = list[tuple[int, str, float, float | None, list[float]]]
"""Losses as they can be told: (micro-batch, dtype, value, count, other counts)."""


def said_of(losses: Mapping[int, MicroLoss]) -> Said:
    """The losses of micro-batches, for the other ranks."""
    said = []
    for m, loss in losses.items():
        dtype, count = str(loss.value.dtype).removeprefix("torch."), loss.count
        others = [float(other) for other in loss.others]
        said.append((m, dtype, loss.value.item(), None if count is None else float(count), others))
    return said


def told(said: Said) -> list[MicroLoss]:
    """The losses that ranks have told, by rising micro-batch; the same bits on every rank."""
    return [
        MicroLoss(torch.tensor(value, dtype=getattr(torch, dtype)), count, tuple(others))
        for _, dtype, value, count, others in sorted(said, key=itemgetter(0))
    ]


def check_total(total: object) -> float | None:
    """Raises InputError if sums cannot be divided by it."""
    if total is None:
        return None
    number = total.item() if isinstance(total, Tensor) and total.numel() == 1 else total
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not (isfinite(number) and number > 0):
        raise InputError("total cannot divide a loss", got=repr(number), needed="a finite number above 0")
    return float(number)


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()


def _words(returned: object) -> str:
    if isinstance(returned, tuple):
        return f"({', '.join(map(_words, returned))})"
    if not isinstance(returned, Tensor):
        return type(returned).__name__
    return f"{'complex ' if returned.is_complex() else ''}{tuple(returned.shape)}"
