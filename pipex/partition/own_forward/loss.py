"""The loss that a model's own forward computes, as the sum and the count of which it is the mean.

A model returns the mean over one micro-batch. The mean over all of them needs sums and counts, and these are lost where
the mean is made: in torch's loss functions. So while the end of the forward runs, ``Means`` looks at the calls of those
functions, and makes a mean as the quotient of the two that it keeps.

    what the loss is                                      what comes of it
    a mean, as a function of torch returned it            its sum and its count
    a quotient of two scalars, or the mean of a tensor    the same
    means with other things (a router's loss) or weights  loss × count, count: each micro-batch's loss as a whole
                                                          weighs as much as what its means have counted
    made of sums or of single losses, or without torch's  refused: what it was divided by has not been seen
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipex.errors import InputError, UnsupportedModule
from pipex.torch_internals import sequence_number, version, weight_on_the_way_to_a_mode


@dataclass(frozen=True, slots=True)
class OwnLoss:
    """The loss of a micro-batch.

    Attributes:
        sum: of the single losses.
        count: how many there are; 0 where nothing is to be learned.
        others: counts of the other means in the loss. It is one mean over all micro-batches only if these are in
            proportion to the count, alike in all of them.
    """

    sum: Tensor
    count: Tensor | float
    others: tuple[Tensor | float, ...] = ()


@dataclass(frozen=True, slots=True)
class _Quotient:
    """A scalar that is a sum divided by a count."""

    value: Tensor
    version: float  # of the value when it was made: it may be added to in place
    sum: Callable[[], Tensor]
    count: Tensor | float

    def is_all_of(self, loss: Tensor) -> bool:
        return loss is self.value and self.version == _version(loss)


class Means(TorchFunctionMode):
    """Active (``with``) from the end of the last layer to the end of a forward, or longer; ``of`` then says what the
    loss was. One object for each forward."""

    def __init__(self) -> None:
        super().__init__()
        self._means: list[_Quotient] = []  # of torch's loss functions
        self._quotients: list[_Quotient] = []  # of anything
        self._undivided: list[str] = []  # calls of loss functions that left the dividing to the model
        self.whole = False
        """whether the loss that was asked for is one mean, and nothing else"""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == F.__name__ and "reduction" in kwargs:
            if func is F.l1_loss and (weight := weight_on_the_way_to_a_mode()) is not None:
                kwargs = {**kwargs, "weight": weight}
            older = kwargs.get("size_average"), kwargs.get("reduce")
            if kwargs["reduction"] in ("mean", "batchmean") and older == (None, None):
                return self._mean(func, args, dict(kwargs))
            self._undivided.append(f"{func.__name__}(reduction={kwargs['reduction']!r})")
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not result.dim() and args:
            self._look(getattr(func, "__name__", ""), result, args)
        return result

    def of(self, output: Any) -> OwnLoss:
        """The loss in what the forward returned.

        Raises:
            InputError: there is none.
            UnsupportedModule: it is not known what it was divided by.
        """
        loss = loss_in(output)
        if loss is None:
            raise InputError(
                "the model returned no loss", got=f"{type(output).__name__} without one",
                needed="a scalar, called loss",
                fix="put the labels into the batch, under the name that the model's forward has for them",
            )  # fmt: skip
        if loss.requires_grad:  # what is only looked at is no part of it
            self._means = [mean for mean in self._means if mean.value.requires_grad]
        for mean in (*self._means, *(() if self._means else self._quotients)):
            if mean.is_all_of(loss):
                self.whole = True
                return OwnLoss(mean.sum(), mean.count)
        if self._undivided or not self._means:
            raise UnsupportedModule(
                "over how many tokens or samples the model's own loss is a mean cannot be seen",
                got=", ".join(dict.fromkeys(self._undivided)) or "none of the loss functions of torch.nn.functional",
                needed="their means, or one quotient of a sum and a count",
                fix="pass a loss_fn that returns (sum, count); or, if each micro-batch is to weigh by its samples, "
                "loss_fn=lambda output, target: output.loss, and the labels as the target too",
            )  # fmt: skip
        first, *others = (mean.count for mean in self._means)
        return OwnLoss(_wide(loss) * first, first, tuple(count for count in others if count is not first))

    def beside(self, loss: Tensor) -> int:
        """How many of the means that were made with a graph are no part of this loss."""
        nodes = {mean.value.grad_fn for mean in self._means if mean.value.requires_grad}
        oldest = min((sequence_number(node) for node in nodes), default=0)
        todo, seen = [loss.grad_fn], set()
        while todo:  # of the graph only what was made since
            node = todo.pop()
            if node is not None and node not in seen and sequence_number(node) >= oldest:
                seen.add(node)
                todo += [other for other, _ in node.next_functions]
        return len(nodes - seen)

    def _mean(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A mean, made of its sum and its count. Of nothing it is 0, where torch's is not a number: what else is in the
        loss is then still of use."""
        total, count = _sum_and_count(func, args, kwargs)
        divisor = torch.where(count == 0, 1, count) if isinstance(count, Tensor) else max(count, 1)
        narrow = _narrow_result(args[0])
        mean = (total / divisor).to(narrow or total.dtype)
        self._means.append(_Quotient(mean, _version(mean), lambda: total, count))
        return mean

    def _look(self, name: str, result: Tensor, args: tuple[Any, ...]) -> None:
        """Keeps a quotient of two scalars, and the mean of all elements of a tensor."""
        of = args[0]
        if not isinstance(of, Tensor):
            return
        if name == "mean" and of.dim():
            count = float(of.numel())
            self._quotients.append(_Quotient(result, _version(result), lambda: _wide(result) * count, count))
        elif name in _DIVISIONS and not of.dim() and isinstance(args[1], Tensor) and not args[1].requires_grad:
            if any(known.value is of for known in (*self._means, *self._quotients)):
                return  # a mean divided by a weight
            self._quotients.append(_Quotient(result, _version(result), lambda: of, args[1]))


_DIVISIONS = frozenset({"div", "true_divide", "__truediv__"})


def loss_in(output: Any) -> Tensor | None:
    """The loss in what a model's forward returned, if there is one: its ``loss``; of a tuple the only
    scalar; or the output itself."""
    loss: Any
    if isinstance(output, Tensor):
        loss = None if output.dim() else output
    elif isinstance(output, tuple) and not hasattr(output, "loss"):
        scalars = [value for value in output if isinstance(value, Tensor) and not value.dim()]
        loss = scalars[0] if len(scalars) == 1 else None
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def own_loss(output: OwnLoss, target: None) -> OwnLoss:
    """The loss function of a pipeline whose last stage returns its own."""
    return output


def _sum_and_count(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | float]:
    """What the mean that such a call returns is the quotient of. The sum of losses of fewer bits than float32 is one of
    float32."""
    narrow = _narrow_result(args[0])

    def single(**changed: Any) -> Tensor:
        losses: Tensor = func(*args, **{**kwargs, **changed, "reduction": "none"})
        return losses

    def summed(losses: Tensor) -> Tensor:
        return losses.sum(dtype=torch.float32 if narrow else None)

    if func in _OF_CLASSES:
        classes = args[2] if func is _linear_cross_entropy else args[1]
        total = summed(single()) if narrow else func(*args, **{**kwargs, "reduction": "sum"})
        if classes.is_floating_point():  # a probability for each
            return total, float(classes.numel() // classes.shape[1 if classes.dim() > 1 else 0])
        ignored = kwargs["ignore_index"]
        counted = classes != (-100 if ignored is None else ignored)
        if kwargs["weight"] is None:
            return total, counted.sum()
        return total, torch.where(counted, kwargs["weight"][torch.where(counted, classes, 0)], 0).sum()
    losses = single()
    if func is F.ctc_loss:  # its mean is one over the samples, of each one's mean over its target
        lengths = torch.as_tensor(args[3], device=losses.device).clamp(min=1)
        return summed(losses / lengths), float(losses.numel())
    if kwargs["reduction"] == "batchmean":
        return summed(losses), float(args[0].shape[0])
    if func in (F.mse_loss, F.l1_loss) and kwargs.get("weight") is not None:
        return summed(losses), kwargs["weight"].sum()
    return summed(losses), float(losses.numel())


_linear_cross_entropy: Callable[..., Any] | None = getattr(F, "linear_cross_entropy", None)  # from torch 2.12 on
_OF_CLASSES = (F.cross_entropy, F.nll_loss, _linear_cross_entropy)


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _narrow_result(input: Tensor) -> torch.dtype | None:
    """What a loss function returns for an input of fewer bits than float32; under autocast it makes that float32."""
    return input.dtype if _is_narrow(input.dtype) and not torch.is_autocast_enabled(input.device.type) else None


def _wide(loss: Tensor) -> Tensor:
    return loss.float() if _is_narrow(loss.dtype) else loss


def _version(tensor: Tensor) -> float:
    """How often a tensor was changed in place; equal to nothing where that is not counted."""
    return nan if torch.is_inference(tensor) else version(tensor)
