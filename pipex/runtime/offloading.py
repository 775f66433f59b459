"""A stage whose activations go to host memory between F and I, when the plan says so (``pipex.plan.offload``).

    F ─┬─ copy out ──► gone ┄┄┄ nothing on the device ┄┄┄ back ── copy back ──► I ── W      copies: on their own streams
       └─ next actions ...

Parameters, buffers, inputs and outputs stay: they live on all the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipex.plan import Action, Plan
from pipex.plan.offload import away
from pipex.runtime.copying import tensors_in
from pipex.runtime.loss import Share
from pipex.runtime.saved import Saved
from pipex.runtime.stage_runner import StageRunner


class OffloadingRunner(StageRunner):
    """Arguments as of ``StageRunner``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._saved: dict[int, Saved] = {}

    def forward(
        self, step: int, microbatch: int, inputs: tuple[Any, ...], target: Any, share: Share, split: bool
    ) -> tuple[Tensor, ...]:
        """F; as of ``StageRunner``."""
        saved = self._saved[microbatch] = Saved()
        with saved_tensors_hooks(saved.pack, saved.unpack):
            outputs = super().forward(step, microbatch, inputs, target, share, split)
        kept = [*self.stage.parameters(), *self.stage.buffers(), *tensors_in((inputs, target)), *outputs]
        saved.stay(kept)
        return outputs

    def copy_out(self, microbatch: int) -> None:
        """Begins after F."""
        self._saved[microbatch].copy_out()

    def gone(self, microbatch: int) -> None:
        """The copy has ended, and the device's memory is free."""
        self._saved[microbatch].gone()

    def back(self, microbatch: int) -> None:
        """There is room for it again: the copy back begins."""
        self._saved[microbatch].back()

    def before_backward(self, microbatch: int) -> None:
        """As of ``StageRunner``."""
        self._saved.pop(microbatch).ready()

    def reset(self) -> None:
        """As of ``StageRunner``."""
        super().reset()
        self._saved.clear()


Move = Callable[[], None]


def moves(plan: Plan, rank: int, runners: Mapping[int, StageRunner]) -> dict[Action, tuple[list[Move], list[Move]]]:
    """By the actions of a rank's order, of a plan with nothing fused, what its stages do before and after them."""
    order = plan.orders[rank]
    found: defaultdict[Action, tuple[list[Move], list[Move]]] = defaultdict(lambda: ([], []))
    moving = [(one, _runner(runners[one.stage])) for one in away(plan, rank) if one.gone < one.back]
    for one, runner in moving:
        found[order[one.forward]][1].append(partial(runner.copy_out, one.microbatch))
        found[order[one.gone]][0].append(partial(runner.gone, one.microbatch))
    for one, runner in moving:  # into room that others have left
        found[order[one.back]][0].append(partial(runner.back, one.microbatch))
    return dict(found)


def _runner(runner: StageRunner) -> OffloadingRunner:
    assert isinstance(runner, OffloadingRunner)
    return runner
