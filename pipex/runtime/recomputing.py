"""A stage that keeps only its input between F and I, and makes what its backward needs anew at the beginning of I.

    F   the forward as it is, but of what autograd would save nothing is kept; the message goes on, the graph does not
    I   the forward once more, on the same input, weights, random numbers and autocast; its tape is that of I and W

So a recomputed micro-batch is whole in memory from I on only. A forward that gives something else the second time would
make wrong gradients: what a stage keeps is watched (``shared_state``), and on the CPU its outputs are compared.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipex.errors import UnsupportedModule
from pipex.runtime.copying import checksum, copy
from pipex.runtime.loss import Share
from pipex.runtime.stage_runner import StageRunner


class _Forward(NamedTuple):
    """What a forward had, which is to run once more, and what it gave."""

    step: int
    inputs: tuple[Any, ...]
    target: Any
    share: Share
    split: bool
    drawn_from: tuple[Any, ...]
    gave: list[object]


class RecomputingRunner(StageRunner):
    """Arguments as of ``StageRunner``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._again: dict[int, _Forward] = {}

    def forward(
        self, step: int, microbatch: int, inputs: tuple[Any, ...], target: Any, share: Share, split: bool
    ) -> tuple[Tensor, ...]:
        """F; as of ``StageRunner``."""
        drawn_from = _generators()
        used = inputs, target
        if not self.survey.plain or self._loss_draws:  # layers and losses may work in place on what they get
            used = copy(used)
        with saved_tensors_hooks(_forget, _forgotten):
            outputs = super().forward(step, microbatch, *used, share, split=False)
        del self.live[microbatch]
        gave = _marks(outputs or [self.losses[microbatch].value])
        self._again[microbatch] = _Forward(step, inputs, target, share, split, drawn_from, gave)
        return tuple(output.detach().requires_grad_(output.requires_grad) for output in outputs)

    def before_backward(self, microbatch: int) -> None:
        """The forward once more.

        Raises:
            UnsupportedModule: it gave something else.
        """
        again = self._again.pop(microbatch)
        told = self.losses.get(microbatch)
        with _drawing_from(again.drawn_from):
            outputs = super().forward(again.step, microbatch, again.inputs, again.target, again.share, again.split)
        if told is not None:
            self.losses[microbatch], outputs = told, (self.losses[microbatch].value,)
        if _marks(outputs) != again.gave:
            raise UnsupportedModule(
                f"stage {self.index} is recomputed, and its second forward gave something else than its first one",
                got="a forward or a loss function that depends on something that changes",
                needed="one that depends on its inputs, its parameters and random numbers alone",
                fix="look for counters, iterators and generators of its own; or run a plan that keeps this stage",
            )

    def reset(self) -> None:
        """As of ``StageRunner``."""
        super().reset()
        self._again.clear()


def _forget(_: Tensor) -> None:
    return None


def _forgotten(_: None) -> NoReturn:
    raise AssertionError("nobody goes back through the first forward of a recomputed stage")


def _marks(tensors: Iterable[Tensor]) -> list[object]:
    """Of each its form, and on the CPU a checksum: on a GPU two runs of an operation need not have the same bits."""
    return [(t.dtype, t.shape, t.stride(), t.requires_grad, checksum(t) if t.is_cpu else None) for t in tensors]


# torch's generators are seeded before each layer. Layers that are dropped by Python's or NumPy's random numbers are to
# be dropped again.


def _generators() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


@contextmanager
def _drawing_from(states: Sequence[Any]) -> Iterator[None]:
    before = _generators()
    _set_generators(states)
    try:
        yield
    finally:
        _set_generators(before)


def _set_generators(states: Sequence[Any]) -> None:
    own, of_numpy = states
    random.setstate(own)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)
