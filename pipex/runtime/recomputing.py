"""A stage that keeps only its input between F and I, and makes what its backward needs anew at the beginning of I.

    F   the forward as it is, but of what autograd would save nothing is kept; the message goes on, the graph does not
    I   the forward once more, on the same input, weights, seeds and autocast; its tape is that of I and W

So a recomputed micro-batch is whole in memory from I on only.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipex.runtime.loss import Share
from pipex.runtime.stage_runner import StageRunner


class _Forward(NamedTuple):
    """What a forward had, which is to run once more."""

    step: int
    microbatches_before: int
    inputs: tuple[Any, ...]
    target: Any
    share: Share
    split: bool


class RecomputingRunner(StageRunner):
    """Arguments as of ``StageRunner``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._again: dict[int, _Forward] = {}

    def forward(
        self, step: int, microbatch: int, inputs: tuple[Any, ...], target: Any, share: Share, split: bool
    ) -> tuple[Tensor, ...]:
        """F; as of ``StageRunner``."""
        self._again[microbatch] = _Forward(step, self.microbatches_before, inputs, target, share, split)
        used = inputs if self.survey.plain else _copy(inputs)  # layers may work in place on what they get
        with saved_tensors_hooks(_forget, _forgotten):
            outputs = super().forward(step, microbatch, used, target, share, split=False)
        del self.live[microbatch]
        return tuple(output.detach().requires_grad_(output.requires_grad) for output in outputs)

    def before_backward(self, microbatch: int) -> None:
        """The forward once more."""
        again = self._again.pop(microbatch)
        told = self.losses.get(microbatch)
        super().forward(again.step, microbatch, again.inputs, again.target, again.share, again.split)
        if told is not None:
            self.losses[microbatch] = told

    def reset(self) -> None:
        """As of ``StageRunner``."""
        super().reset()
        self._again.clear()


def _forget(_: Tensor) -> None:
    return None


def _forgotten(_: None) -> NoReturn:
    raise AssertionError("nobody goes back through the first forward of a recomputed stage")


def _copy(value: Any) -> Any:
    """The same, with copies of the tensors in it: of the same strides, and leaves that require grad where they did."""
    if isinstance(value, Tensor):
        whole = value.detach().resolve_conj().resolve_neg()
        if whole.layout is not torch.strided or whole.is_nested or not whole.numel():
            return whole.clone().requires_grad_(value.requires_grad)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(whole.shape, whole.stride(), strict=True))
        memory = whole.as_strided((extent,), (1,)).clone().untyped_storage()
        copy = torch.empty(0, dtype=value.dtype, device=value.device).set_(memory, 0, whole.shape, whole.stride())
        return copy.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        copies = {key: _copy(one) for key, one in value.items()}
        return copies if type(value) is dict else type(value)(copies)
    if type(value) in (tuple, list):
        return type(value)(map(_copy, value))
    return value
