"""The pipeline: a model's stages on their ranks, trained by a plan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic_ns
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import pipex.plan as plans
from pipex.errors import CheckpointError, InputError, PipexError
from pipex.observe import Event, Observer
from pipex.observe.times import times_of
from pipex.partition import Stage, as_stages, layout_of, materialize, without_others
from pipex.plan import Plan
from pipex.runtime import checkpoint, intake, microbatch, modes, tied
from pipex.runtime.agreement import share
from pipex.runtime.arguments import agree_on, check_options, check_stages, enabled
from pipex.runtime.commit import Gradients
from pipex.runtime.elsewhere import Elsewhere
from pipex.runtime.executor import Executor, StepData
from pipex.runtime.loss import Loss, LossFunction, of_batch
from pipex.runtime.main_weights import refuse_main_grad
from pipex.runtime.seeding import Seeds
from pipex.runtime.shared_state import watch
from pipex.runtime.stage_runner import StageRunner
from pipex.runtime.trainable import Trainables
from pipex.runtime.update import OptimizerFactory, Update
from pipex.runtime.wiring import connect
from pipex.runtime.worlds import current_world
from pipex.state import Stateful
from pipex.transport.interface import Buffers, Phase, World

_made: WeakKeyDictionary[World, int] = WeakKeyDictionary()
"""How many pipelines each world has. All ranks make them in the same order, so the number says which one it is."""


class Pipeline:
    """A model in stages, trained step by step. Every rank builds it with the same arguments and calls the same methods.

    ``step`` is ``forward_backward`` and ``update``; several ``forward_backward`` may come before one ``update``.

    The number contract: micro-batch m with n_m of the batch's N samples contributes its mean loss times n_m / N. Where
    ``loss_fn`` returns (sum, count), gradients and loss are those of all sums together, divided by all counts together.
    Sums run in rising micro-batch order per stage, whatever the plan; on the CPU in float32 losses, gradients and
    parameters are bit-equal to ``pipex.runtime.reference`` in one process with the same number of threads.

    Args:
        stages: all stages of the model in order, from ``pipex.split_model`` or any modules that map a tensor (or a
            tuple of tensors) to a tensor (or a tuple); as many as the plan has. This rank's are kept, and forms of the
            others. Those on the meta device get memory here, and values by ``load``.
        plan: what every rank does in a step, from ``pipex.plan.build``; proven here before anything runs.
        loss_fn: (output, target) of a micro-batch -> its mean loss, a scalar, or the sum of its losses and their number
            (of tokens that are not ignored, say); runs on the last stage's rank.
        optimizer: makes the optimizer from this rank's parameters (``update.Parameters``: a list, and by name in its
            attribute ``named``), on a rank without any too; None to evaluate only.
        clip_norm: the largest 2-norm of all gradients together; None not to clip.
        scaler: scales what the backward starts from, and is updated with the optimizer, by what all ranks have found.
        main_weights: whether parameters of fewer bits than float32 get float32 gradients and weights, which the
            optimizer updates in their place.
        seed: seed of the layers that draw random numbers, each by (seed, step, micro-batch, layer).
        observer: gets an event for every action that this rank ran.
        exact: whether gradients have autograd's bits; None: on the CPU only. On a GPU the weight gradients of a split
            backward are then made by fewer and faster products, which are as near to float64.

    Raises:
        InputError: an argument cannot be used; PlanError: the plan is no legal schedule.
        UnsupportedModule: a parameter brings a ``main_grad``, or shares memory with one of another rank; or a buffer is
            on the meta device that no checkpoint holds.
        ConfigMismatch: the ranks were given different plans or options, or copies of a tied parameter that differ.
        PeerError: another rank ended the run.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        plan: Plan,
        loss_fn: LossFunction,
        *,
        optimizer: OptimizerFactory | None = None,
        clip_norm: float | None = None,
        scaler: GradScaler | None = None,
        main_weights: bool = False,
        seed: int = 0,
        observer: Observer | None = None,
        exact: bool | None = None,
    ) -> None:
        self.world = current_world()
        self._number = _made[self.world] = _made.get(self.world, 0) + 1
        self.plan = plan
        self.steps = 0  # updates made
        self._observer = observer
        self._failed: BaseException | None = None
        self._closed = False
        with self._together():
            plans.validate(plan)
            check_stages(plan, self.world.ranks, stages)
            check_options(loss_fn, optimizer, clip_norm, scaler, seed)
            model, scaler = as_stages(stages), enabled(scaler)
            self.layout = layout_of(plan, model)
            agree_on(self.world, self.layout, model, {
                "optimizer": optimizer is not None, "clip_norm": clip_norm, "scaler": scaler is not None,
                "main_weights": main_weights, "seed": seed, "exact": exact,
            })  # fmt: skip
            refuse_main_grad(model)
            placement, own, device = plan.placement, plan.placement.stages_of(self.world.rank), self.world.device
            runnable = plans.unfused(plan)  # one device gains nothing from a fused pair
            watches = {s: watch(model, runnable, s) for s in own}
            self.stages = without_others(model, own)
            blank = materialize([model[s] for s in own], device)
            self._without_values = any(share(self.world, "Pipeline(...)", blank))  # until a load
            self._seeds, accumulators = Seeds(device, seed), tied.Accumulators()
            self._loss = Loss(loss_fn, None if scaler is None else scaler.scale)
            shared = placement, self._loss, self._seeds, exact, accumulators
            self._runners = {s: StageRunner(self.stages[s].to(device), *shared, watches[s]) for s in own}
            others = Elsewhere(model, self.stages)
            self._trainables = Trainables(self.layout.ties, self._runners, accumulators, others)
            self._gradients = Gradients(self.world, self.layout, self._trainables)
            self._update = Update(
                self.world, self._gradients, self.local_stages, main_weights, optimizer, clip_norm, scaler
            )
            orders = plans.communicate(runnable)
            self._links = connect(self.world, self.layout, runnable, orders)
            self._times = times_of(self.world.device, observer)
            self._executor = Executor(self.world, runnable, orders[self.world.rank], self._runners, self._times)
            self._executor.connect(self._links)

    @property
    def local_stages(self) -> list[Stage]:
        """The stages that this rank holds, in order."""
        return [runner.stage for _, runner in sorted(self._runners.items())]

    @property
    def peak_activations(self) -> int:
        """Most micro-batches that this rank has held at once (from F to the end of B or W), over its stages."""
        return self._executor.peak_live

    @property
    def buffers(self) -> dict[str, Buffers]:
        """Per edge that this rank sends on, the memory of its buffers and how often they have grown."""
        return {f"{kind} {source}→{to}": end.buffers for (source, to, kind), end in self._links.senders.items()}

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """This rank's, as ``optimizer=`` has made it: for schedules of the learning rate, and new parameters."""
        return self._update.optimizer

    @property
    def gradient_norm(self) -> float | None:
        """2-norm of all gradients at the last update, before clipping; None unless it was clipped or guarded."""
        return self._update.norm

    def step(
        self, batch: Any, target: Any, *, total: float | Tensor | None = None, skip_nonfinite: bool = False
    ) -> float:
        """``forward_backward`` and ``update``. Returns the batch's mean loss, the same on every rank.

        Args, Raises: as theirs.
        """
        loss, since = self._pass("step", batch, target, total)
        self._finish(since, skip_nonfinite)
        return loss

    def forward_backward(self, batch: Any, target: Any, *, total: float | Tensor | None = None) -> float:
        """The plan, without an update. Returns the batch's mean loss, the same on every rank.

        Gradients of several calls before one ``update`` add up, as in torch: divide the loss by their number for the
        mean over equal batches. Sums with counts need no such care: ``update`` divides by the counts of all calls.

        Args:
            batch: a tensor, a tuple of positional or a dict of keyword arguments of the first stage, cut along
                dimension 0, or a list of ready micro-batches (``pipex.runtime.microbatch``); read on the first stage's
                rank, may be None elsewhere.
            target: likewise for the last stage's rank.
            total: by which sums of losses are divided before their backward, for the bits of a process that does so;
                the count over all calls before the next update. May be None on ranks that do not hold the last stage.

        Raises:
            InputError: an argument cannot be used, or does not fit the others'; nothing has begun then, and the
                pipeline lives on. The loss function returned what is no loss, or one that nothing can be trained by.
            ConfigMismatch: the ranks were given other batches; nothing has begun.
            MessageMismatch: the ranks do not run one plan.
            PeerError: another rank ended the run; this rank's parameters are those of the last step boundary.
        """
        loss, since = self._pass("forward_backward", batch, target, total)
        self._done(since, self.steps + 1, Phase.REDUCE)
        return loss

    def reduce_gradients(self) -> None:
        """Completes ``.grad`` on every rank, after the last ``forward_backward`` before an update: tied parameters are
        added up, sums divided by their count, scaled gradients unscaled. Call it to look at gradients, or to change
        them, before ``update``, which does it otherwise.

        Raises:
            InputError: there was no ``forward_backward``, some of them had means and some sums, or nothing was counted.
            PeerError: another rank ended the run.
        """
        self._check_alive(buffers=True)
        self._update.check()
        with self._together():
            self.world.at(self.steps + 1, Phase.REDUCE)
            self._update.reduce(self.steps + 1, self._links)

    def update(self, *, skip_nonfinite: bool = False) -> bool:
        """Clips, makes the optimizer's step on every rank, and forgets the gradients.

        Args:
            skip_nonfinite: leave the optimizer's step out, on all ranks, if the norm of all gradients is not finite.

        Returns:
            whether the optimizer's step was made: not if it was left out, by this or by the scaler.

        Raises: as ``reduce_gradients``.
        """
        return self._finish(monotonic_ns(), skip_nonfinite)

    def zero_grad(self) -> None:
        """Forgets every ``forward_backward`` since the last ``update``: gradients and what they are to be divided by.
        Every rank must call it, and none waits for another. ``update`` does it by itself."""
        self._check_alive()
        self._update.zero_grad()

    def evaluate(self, batch: Any, target: Any) -> float:
        """The batch's mean loss in evaluation mode, without gradients. Arguments as of ``forward_backward``, but there
        may be fewer samples than micro-batches, and any number of ready ones."""
        with modes.evaluation(self.local_stages, self._together):
            data = self._begin("evaluate", batch, target, None)
            with self._together():
                self.world.at(data.step, Phase.EVALUATING)
                with self._seeds.apart(data.step, self.world.rank):
                    self._executor.evaluate(data)
                loss, _ = self._end()
                self.world.at(self.steps, Phase.IDLE)
                return loss

    def save(
        self, directory: str | os.PathLike[str], meta: dict[str, Any] | None = None, *,
        state: Mapping[str, Stateful] | None = None,
    ) -> None:  # fmt: skip
        """Collective: writes model and optimizer; the directory's old checkpoint stays until the new one is whole.

        Args:
            meta: anything JSON can hold; ``load`` returns it.
            state: what else this rank goes on from, by name, such as ``{"scheduler": scheduler}``: objects with
                ``state_dict`` and ``load_state_dict``. Every rank saves its own.

        Raises:
            CheckpointError: it cannot be written; the old checkpoint is untouched. InputError: the model has no values.
        """
        self._check_alive(values=True)
        with self._together():
            self.world.at(self.steps, Phase.SAVING)
            problem = checkpoint.save(
                self.world, self.local_stages, self.optimizer, state or {}, self.steps, directory, meta or {},
                self._update.main,
            )  # fmt: skip
            self.world.at(self.steps, Phase.IDLE)
        if problem is not None:
            raise CheckpointError(problem)  # on every rank; the pipeline itself can go on

    def load(self, directory: str | os.PathLike[str], *, state: Mapping[str, Stateful] | None = None) -> dict[str, Any]:
        """Collective: restores model, optimizer and step count, from any number of ranks. Returns the ``meta`` of
        ``save``.

        Args:
            state: the objects to restore, by the names that they were saved under. On as many ranks as saved them each
                gets its own state back; on another number they must have been the same on all ranks.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model. Then nothing has changed on any
                rank: the pipeline can go on, or load another. Only where a ``load_state_dict`` fails, this rank's
                pipeline is at an end.
        """
        with self._together():
            found = checkpoint.load(
                self.world, self.local_stages, self.optimizer, state or {}, directory, self._update.main
            )
            if not isinstance(found, str):
                self.steps, meta = found
                self._update.loaded()
                self._without_values = False
                return meta
        raise CheckpointError(found)  # on every rank

    def close(self) -> None:
        """Frees the buffers between ranks; what needs them is a PipexError afterwards. Safe to repeat;
        ``pipex.launch`` ends the world itself."""
        self._closed = True
        self._executor.disconnect()
        self._links.close()

    # The two halves of a step.

    def _pass(self, call: str, batch: Any, target: Any, total: object) -> tuple[float, int]:
        """The plan. Returns the mean loss, and since when this rank has been done with its actions."""
        data = self._begin(call, batch, target, total)
        with self._together():
            with self._seeds.apart(data.step, self.world.rank):
                self._executor.train(data)
            self._trainables.backward_done()
            since = self._phase(data.step, Phase.REDUCE)
            loss, count = self._end()
            self._times.finish()
            self._update.add(count, self._loss.total)
            self.world.at(self.steps, Phase.IDLE)
            return loss, since

    def _finish(self, since: int, skip_nonfinite: bool) -> bool:
        self.reduce_gradients()
        with self._together():
            step = self.steps + 1
            self._done(since, step, Phase.REDUCE)
            begin = self._phase(step, Phase.OPTIMIZER)
            made = self._update.apply(skip_nonfinite)
            self.steps += made
            self._done(begin, step, Phase.OPTIMIZER)
            self.world.at(self.steps, Phase.IDLE)
            return made

    def _begin(self, call: str, batch: Any, target: Any, total: object) -> StepData:
        """Agrees on what is to be done. What goes wrong afterwards, before the return, has begun nothing."""
        self._check_alive(buffers=True, values=True)
        step, training = self.steps + 1, call != "evaluate"
        with self._together():
            self.world.at(step, Phase.START)
            self._trainables.look(training)
            runners = self._runners.values()
            for runner in runners:
                runner.microbatches_before = len(self._update.counts) * self.plan.microbatches if training else 0
            first, last = any(runner.first for runner in runners), any(runner.last for runner in runners)
            given = intake.take(self.world, self.plan.microbatches, batch, target, total, first=first, last=last,
                                training=training)  # fmt: skip
            if training:
                intake.refuse_training(given, self.plan, self._update, bool(self._trainables.trained))
            every = share(self.world, call, {"the pipeline, counted as they were made": self._number, "step": step,
                                             **self._trainables.said, **given.said})  # fmt: skip
        try:
            agreed = intake.agreed(self.plan.microbatches, given, every)
            self._update.check_total(agreed.total, training)
        except PipexError:
            self.world.at(self.steps, Phase.IDLE)
            raise
        self._loss.total, self._loss.trains = agreed.total, agreed.trains
        count, samples = len(agreed.samples), sum(agreed.samples)
        inputs: Sequence[tuple[Any, ...]] = ()
        targets: Sequence[Any] = ()
        with self._together():
            if first and given.batch is not None:
                pieces = microbatch.cut(batch, given.batch, count, self.world.device)
                inputs = [microbatch.as_arguments(piece) for piece in pieces]
            if last and given.target is not None:
                targets = microbatch.cut(target, given.target, count, self.world.device)
        return StepData(step, inputs, targets, [n / samples for n in agreed.samples])

    def _end(self) -> tuple[float, float | None]:
        """Collective: the mean loss of what the executor has run, and what its gradients are still to be divided by."""
        self._links.flush()  # before the exchange: past it, what was received on any rank has really arrived
        runner = next((r for r in self._runners.values() if r.last), None)
        mine = None
        if runner is not None:
            mine = of_batch([runner.losses[m] for m in sorted(runner.losses)], self._loss.total)
        self._executor.reset()
        loss, count = next(filter(None, share(self.world, "the losses", mine)))
        return float(loss), count

    # Agreement, failure, progress.

    def _check_alive(self, *, buffers: bool = False, values: bool = False) -> None:
        if self._failed is not None:
            raise PipexError(f"this pipeline has failed before ({self._failed}); start a new run") from self._failed
        if buffers and self._closed:
            raise PipexError("this pipeline is closed, and its buffers are gone; make a new one")
        if values and self._without_values:
            raise InputError("the model has no values yet", got="one that was made on the meta device",
                             needed="load(directory) first, or a model that pipex.build_stages builds")  # fmt: skip

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What fails here fails on every rank."""
        self._check_alive()
        try:
            yield
        except BaseException as error:
            self._failed = error
            self.world.fail(error)
            raise

    def _phase(self, step: int, phase: Phase) -> int:
        self.world.at(step, phase)
        return monotonic_ns()

    def _done(self, begin: int, step: int, phase: Phase) -> None:
        if self._observer is not None:
            self._observer(Event(step, phase.name.lower(), -1, -1, begin, monotonic_ns()))
