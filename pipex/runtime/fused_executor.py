"""An executor of plans with fused pairs: the forward of one micro-batch beside the backward of another (``pairs``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from pipex.observe.times import Times
from pipex.plan import Action, Kind, Plan
from pipex.runtime.executor import Executor, StepData, _Ends
from pipex.runtime.pairs import Way, why_apart
from pipex.runtime.precision import as_recorded
from pipex.runtime.stage_runner import StageRunner
from pipex.torch_internals import any_autocast
from pipex.transport.interface import World


class FusedExecutor(Executor):
    """As ``Executor``, where all receives of a pair are before it in the order, and all its sends after it.

    A pair's parts have a place of their own each, as the world counts: that of the forward is published until it has
    ended, and then the other's, so that a rank that fails or is lost is named by what it was doing.

    Args:
        order: this rank's actions, sends and receives included, pairs as one.
        way: how pairs run at once.
    """

    def __init__(
        self, world: World, plan: Plan, order: Sequence[Action], runners: Mapping[int, StageRunner], times: Times,
        way: Way,
    ) -> None:  # fmt: skip
        super().__init__(world, plan, [part for action in order for part in action.each], runners, times)
        self._way = way
        self._program = [(partial(self._on_stage, run), runner, ends, m) for run, runner, ends, m in self._program]
        place = 0
        for action in order:
            if action.parts:
                self._fuse(place, why_apart(action))
            place += len(action.each)

    def train(self, data: StepData) -> None:
        self.pairs_at_once, self.why_apart = 0, ""
        try:
            super().train(data)
        finally:
            self._way.end()

    def _fuse(self, place: int, apart: str) -> None:
        """Puts a pair into the place of its forward, nothing into that of its backward; or says what keeps it apart."""
        run, *_ = forward = self._program[place]
        if apart:
            self._program[place] = (partial(self._apart, apart, run), *forward[1:])
            return
        backward = self._program[place + 1][1:]
        self._program[place] = (partial(self._pair, backward, place + 1), *forward[1:])
        self._program[place + 1] = (self._made_in_pair, *backward)

    def _on_stage(self, run: Callable[..., None], runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        with self._way.on(runner.index):
            run(runner, ends, microbatch)

    def _apart(self, why: str, run: Callable[..., None], *what: Any) -> None:
        self.why_apart = why
        run(*what)

    def _made_in_pair(self, *_: object) -> None: ...

    def _pair(
        self, backward: tuple[StageRunner, _Ends, int], place: int, runner: StageRunner, ends: _Ends, microbatch: int
    ) -> None:
        """Both receives, both parts, both sends.

        Args:
            backward: what the backward is of; ``place``: its place in the program.
        """
        way, other, its_ends, its_microbatch = self._way, *backward
        step = self._data.step
        with way.on(runner.index):
            inputs = self._input(runner, ends, microbatch)  # held until both have met again (``pairs`` says why)
        with way.on(other.index):
            gradients = self._output_gradients(*backward)
        self.peak_live = max(self.peak_live, sum(map(len, self._live)) + 1)
        forward_times: list[Any] = []
        backward_times: list[Any] = []
        outputs, found, why = way.run(
            lambda: self._timed(forward_times, self._forward, runner, microbatch, inputs),
            lambda: self._timed(backward_times, _backward, other, its_microbatch, gradients),
            (runner.index, other.index),
            lambda: self._world.at(step, self._first_position + place),
        )
        # The observer hears of both here, in the plan's order, whichever has ended first.
        self._times.note(forward_times[0], step, Kind.F.value, runner.index, microbatch, forward_times[1])
        self._times.note(backward_times[0], step, Kind.B.value, other.index, its_microbatch, backward_times[1])
        if why:
            self.why_apart = why
        else:
            self.pairs_at_once += 1
        with way.on(runner.index):
            if not runner.last:
                self._hand_over(Kind.SEND_F, ends, ends.activation_out, microbatch, outputs)
        with way.on(other.index):
            if not other.first:
                self._hand_over(Kind.SEND_B, its_ends, its_ends.gradient_out, its_microbatch, found)

    def _timed(self, times: list[Any], run: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
        times.append(self._times.now())
        found = run(*args)
        times.append(self._times.now())
        return found


def _backward(runner: StageRunner, microbatch: int, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    run = runner.backward
    return as_recorded(run, microbatch, gradients) if any_autocast() else run(microbatch, gradients)
