"""Walks one rank's actions. The loop reads like the plan; everything else prepares it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipex.backward.deferral import deferral
from pipex.observe.times import Times
from pipex.plan import Action, Kind, Plan
from pipex.runtime.loss import Share
from pipex.runtime.offloading import Move, moves
from pipex.runtime.precision import as_recorded, forget_casts
from pipex.runtime.stage_runner import StageRunner
from pipex.runtime.versions import Versions
from pipex.torch_internals import any_autocast
from pipex.transport.interface import Links, Receiver, Sender, World


@dataclass(slots=True)
class StepData:
    """What one step works on.

    Attributes:
        step: counted from 1.
        inputs, targets: per micro-batch; empty where this rank does not hold the first or the last stage.
        shares: per micro-batch.
    """

    step: int
    inputs: Sequence[tuple[Any, ...]]
    targets: Sequence[Any]
    shares: Sequence[Share]


@dataclass(slots=True)
class _Ends:
    """A stage's ends of its edges; None at the ends of the pipeline."""

    activation_in: Receiver | None = None
    activation_out: Sender | None = None
    gradient_in: Receiver | None = None
    gradient_out: Sender | None = None
    sends: frozenset[Kind] = frozenset()
    """what the plan sends from this stage by actions of their own"""
    outbox: dict[tuple[Kind, int], tuple[Tensor, ...]] = field(default_factory=dict)


Method = Callable[[StageRunner, _Ends, int], None]
"""What runs an action: of (runner, ends, micro-batch)."""


class Executor:
    """Runs the plan's actions of this rank.

    Args:
        world: where progress is published.
        plan: the plan.
        order: this rank's actions, sends and receives included.
        runners: this rank's stages by index.
        times: takes the time of every action.
        versions: of the weights of this rank's one stage, if they change within a step.
        update: makes the optimizer's step there.
    """

    def __init__(
        self, world: World, plan: Plan, order: Sequence[Action], runners: Mapping[int, StageRunner],
        times: Times, versions: Versions | None = None, update: Callable[[Versions], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._world = world
        self._runners = runners
        self._times = times
        sends = (Kind.SEND_F, Kind.SEND_B)
        self._ends = {
            stage: _Ends(sends=frozenset(a.kind for a in order if a.stage == stage and a.kind in sends))
            for stage in runners
        }
        self._plan, self._versions, self._update = plan, versions, update
        self._deferral = deferral((a.kind.value, a.stage, a.microbatch) for a in order)
        self._moves = moves(plan, world.rank, runners)
        self._program = [
            (self._method_of(action), runners[action.stage], self._ends[action.stage], action.microbatch)
            for action in order
        ]
        self._live = [runner.live for runner in runners.values()]
        self.pairs_at_once = 0  # of the last step (``fused_executor``)
        self.why_apart = ""  # and why the last of the others ran one part after the other
        self.peak_live = 0  # most micro-batches whose state was held at once, over this rank's stages
        self._data = StepData(0, (), (), ())
        self._first_position = 0  # of the program, as the world counts; known when it is connected

    def connect(self, links: Links) -> None:
        """Takes this rank's ends of all edges, of those between its own stages too."""
        self._first_position = links.first_position
        for stage, ends in self._ends.items():
            if (before := self._plan.placement.before(stage)) is not None:
                ends.activation_in = links.receivers[before, stage, "activation"]
                ends.gradient_out = links.senders[stage, before, "gradient"]
            if (after := self._plan.placement.after(stage)) is not None:
                ends.activation_out = links.senders[stage, after, "activation"]
                ends.gradient_in = links.receivers[after, stage, "gradient"]

    def disconnect(self) -> None:
        """Lets go of the ends."""
        for ends in self._ends.values():
            ends.activation_in = ends.activation_out = ends.gradient_in = ends.gradient_out = None

    def train(self, data: StepData) -> None:
        """One step's actions; gradients are in ``.grad`` and losses in the last stage's runner afterwards."""
        self._data = data
        forget_casts()
        if self._versions is not None:
            self._versions.begin()
        self._times.start()
        at, step = self._world.at, data.step
        for position, (run, runner, ends, microbatch) in enumerate(self._program, self._first_position):
            at(step, position)
            run(runner, ends, microbatch)

    def evaluate(self, data: StepData) -> None:
        """All forwards; losses are in the last stage's runner afterwards.

        Micro-batch by micro-batch through this rank's stages, and through the copies of the model by turns: free of
        deadlock with one slot, for any number of them.
        """
        pipes = self._plan.placement.pipes
        self._data = data
        forget_casts()
        with torch.no_grad():
            for microbatch in range(len(data.shares)):
                for stage, runner in sorted(self._runners.items()):
                    if stage in pipes[microbatch % len(pipes)]:
                        self._evaluate(runner, self._ends[stage], microbatch)

    def reset(self) -> None:
        """Forgets the micro-batches under way and the losses."""
        for runner in self._runners.values():
            runner.reset()
        for ends in self._ends.values():
            ends.outbox.clear()

    # One method per kind of action, named after it, and two for an I and its W that are not apart.

    def _method_of(self, action: Action) -> Method:
        if action.kind in (Kind.I, Kind.W) and (action.stage, action.microbatch) not in self._deferral.split:
            method: Method = self._I_with_W if action.kind is Kind.I else self._W_made_with_I
        else:
            method = getattr(self, f"_{action.kind.name}")
        if self._versions is not None:
            method = self._with_its_weights(action, method, self._versions)
        return self._with_moves(method, *self._moves[action]) if action in self._moves else method

    def _with_moves(self, method: Method, before: Sequence[Move], after: Sequence[Move]) -> Method:
        """The action between what is copied to host memory, and back."""

        def run(runner: StageRunner, ends: _Ends, microbatch: int) -> None:
            for move in before:
                move()
            method(runner, ends, microbatch)
            for move in after:
                move()

        return run

    def _with_its_weights(self, action: Action, method: Method, versions: Versions) -> Method:
        """The action on the version of the weights that it uses."""
        version = self._plan.versions[action.stage, action.microbatch]

        def forward(runner: StageRunner, ends: _Ends, microbatch: int) -> None:
            forget_casts()  # of another version
            with versions.forward(microbatch, version):
                method(runner, ends, microbatch)

        def backward(runner: StageRunner, ends: _Ends, microbatch: int) -> None:
            with versions.backward(microbatch):
                method(runner, ends, microbatch)
            if action.kind is not Kind.I:
                versions.done(microbatch)

        return {Kind.F: forward, Kind.I: backward, Kind.W: backward, Kind.B: backward}.get(action.kind, method)

    def _F(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        inputs = self._input(runner, ends, microbatch)
        begin = self._times.now()
        outputs = self._forward(runner, microbatch, inputs)
        self._note(begin, Kind.F, runner, microbatch)
        self._count()
        if not runner.last:
            self._hand_over(Kind.SEND_F, ends, ends.activation_out, microbatch, outputs)

    def _I(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        self._backward(Kind.I, runner.backward_input, runner, ends, microbatch)

    def _I_with_W(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        self._backward(Kind.I, runner.backward, runner, ends, microbatch)

    def _W(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        begin = self._times.now()
        more = (runner.index, microbatch) in self._deferral.followed
        if any_autocast():
            as_recorded(runner.backward_weight, microbatch, more)
        else:
            runner.backward_weight(microbatch, more)
        self._note(begin, Kind.W, runner, microbatch)

    def _W_made_with_I(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        self._note(self._times.now(), Kind.W, runner, microbatch)  # I has taken all the time, W takes none

    def _B(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        self._backward(Kind.B, runner.backward, runner, ends, microbatch)

    def _SEND_F(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        self._send(Kind.SEND_F, runner, ends, ends.activation_out, microbatch)

    def _SEND_B(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        self._send(Kind.SEND_B, runner, ends, ends.gradient_out, microbatch)

    def _RECV_F(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        """Nothing to do: messages come unasked or, over NCCL, when the action that needs one asks."""

    _RECV_B = _RECV_F

    def _UPDATE(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        begin = self._times.now()
        assert self._versions is not None
        self._update(self._versions)
        self._note(begin, Kind.UPDATE, runner, microbatch)

    # What they share.

    def _forward(self, runner: StageRunner, microbatch: int, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        data = self._data
        return runner.forward(
            data.step, microbatch, inputs, data.targets[microbatch] if runner.last else None,
            data.shares[microbatch], (runner.index, microbatch) in self._deferral.split,
        )  # fmt: skip

    def _backward(
        self, kind: Kind, run: Callable[[int, Sequence[Tensor]], tuple[Tensor, ...]], runner: StageRunner, ends: _Ends,
        microbatch: int,
    ) -> None:  # fmt: skip
        gradients = self._output_gradients(runner, ends, microbatch)
        begin = self._times.now()
        runner.before_backward(microbatch)
        self._count()
        found = as_recorded(run, microbatch, gradients) if any_autocast() else run(microbatch, gradients)
        self._note(begin, kind, runner, microbatch)
        if not runner.first:
            self._hand_over(Kind.SEND_B, ends, ends.gradient_out, microbatch, found)

    def _count(self) -> None:
        self.peak_live = max(self.peak_live, sum(map(len, self._live)))

    def _input(self, runner: StageRunner, ends: _Ends, microbatch: int) -> tuple[Any, ...]:
        if runner.first:
            return self._data.inputs[microbatch]
        assert ends.activation_in is not None
        begin = self._times.now()
        inputs = ends.activation_in.receive(self._data.step, microbatch)
        self._note(begin, Kind.RECV_F, runner, microbatch)
        return inputs

    def _output_gradients(self, runner: StageRunner, ends: _Ends, microbatch: int) -> tuple[Tensor, ...]:
        if runner.last:
            return ()
        assert ends.gradient_in is not None
        begin = self._times.now()
        gradients = ends.gradient_in.receive(self._data.step, microbatch)
        self._note(begin, Kind.RECV_B, runner, microbatch)
        return gradients

    def _hand_over(
        self, kind: Kind, ends: _Ends, sender: Sender | None, microbatch: int, tensors: tuple[Tensor, ...]
    ) -> None:
        """When the plan's SEND says so; at once where it has none, since the next stage is on this rank too."""
        if kind in ends.sends:
            ends.outbox[kind, microbatch] = tensors
        else:
            assert sender is not None
            sender.send(self._data.step, microbatch, tensors)

    def _send(self, kind: Kind, runner: StageRunner, ends: _Ends, sender: Sender | None, microbatch: int) -> None:
        assert sender is not None
        begin = self._times.now()
        sender.send(self._data.step, microbatch, ends.outbox.pop((kind, microbatch)))
        self._note(begin, kind, runner, microbatch)

    def _evaluate(self, runner: StageRunner, ends: _Ends, microbatch: int) -> None:
        data = self._data
        inputs = self._input(runner, ends, microbatch)
        outputs = runner.evaluate(
            data.step, microbatch, inputs, data.targets[microbatch] if runner.last else None, data.shares[microbatch]
        )
        if not runner.last:
            assert ends.activation_out is not None
            ends.activation_out.send(data.step, microbatch, outputs)

    def _note(self, begin: Any, kind: Kind, runner: StageRunner, microbatch: int) -> None:
        self._times.note(begin, self._data.step, kind.value, runner.index, microbatch)
