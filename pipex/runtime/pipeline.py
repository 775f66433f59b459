"""The pipeline: a model's stages on their ranks, trained by a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic_ns
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import pipex.plan as plans
from pipex.errors import CheckpointError, InputError, PipexError
from pipex.observe import Event, Observer
from pipex.observe.times import times_of
from pipex.partition import Stage, as_stages
from pipex.plan import Plan
from pipex.runtime import checkpoint, microbatch, tied
from pipex.runtime.agreement import agree
from pipex.runtime.arguments import check_arguments
from pipex.runtime.commit import Gradients
from pipex.runtime.executor import Executor, StepData
from pipex.runtime.stage_runner import LossFunction, StageRunner
from pipex.runtime.wiring import Wiring
from pipex.runtime.worlds import current_world
from pipex.transport.interface import Phase, World

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


_made: WeakKeyDictionary[World, int] = WeakKeyDictionary()
"""How many pipelines each world has. All ranks make them in the same order, so the number says which one it is."""


class Pipeline:
    """A model in stages, trained step by step. Every rank builds it with the same arguments and calls the same methods.

    The number contract: micro-batch m with n_m of the batch's N samples contributes its mean loss times n_m / N.
    Sums run in rising micro-batch order per stage, whatever the plan; on the CPU in float32 losses, gradients and
    parameters are bit-equal to ``pipex.runtime.reference`` in one process with the same number of threads.

    Args:
        stages: all stages of the model in order, from ``pipex.split_model`` or any modules that map a tensor (or a
            tuple of tensors) to a tensor (or a tuple); as many as the plan has.
        plan: what every rank does in a step, from ``pipex.plan.build``; proven here before anything runs.
        loss_fn: (output, target) of a micro-batch -> its mean loss, a scalar; runs on the last stage's rank.
        optimizer: makes the optimizer from this rank's parameters; None to evaluate only.
        clip_norm: the largest 2-norm of all gradients together; None not to clip.
        seed: seed of the layers that draw random numbers, each by (seed, step, micro-batch, layer).
        observer: gets an event for every action that this rank ran.
        exact: whether gradients have autograd's bits; None: on the CPU only. On a GPU the weight gradients of a split
            backward are then made by fewer and faster products, which are as near to float64.

    Raises:
        InputError: an argument cannot be used; PlanError: the plan is no legal schedule.
        ConfigMismatch: the ranks were given different plans or options.
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
        seed: int = 0,
        observer: Observer | None = None,
        exact: bool | None = None,
    ) -> None:
        self.world = current_world()
        self._number = _made[self.world] = _made.get(self.world, 0) + 1
        self.plan = plan
        self.steps = 0  # optimizer steps done
        self._clip_norm = clip_norm
        self._observer = observer
        self._failed: BaseException | None = None
        with self._together():
            plans.validate(plan)
            check_arguments(plan, self.world.ranks, stages, loss_fn)
            said = {
                "ranks": plan.placement.ranks,
                "micro-batches": plan.microbatches,
                "stages": len(stages),
                "plan": f"{plan.family} (digest {plan.digest.hex()[:8]})",
                "clip_norm": str(clip_norm),
                "seed": seed,
                "optimizer": str(optimizer is not None),
                "exact": str(exact),
            }
            self.stages = as_stages(stages)
            said["layers per stage"] = str([len(stage.layers) for stage in self.stages])
            agree(self.world, "Pipeline(...)", said)
            self._ties = tied.separate(self.stages)
            placement, rank, device = plan.placement, self.world.rank, self.world.device
            self._rank_of = [placement.rank_of(s) for s in range(placement.stages)]
            self._runners = {
                s: StageRunner(self.stages[s].to(device), placement, loss_fn, device, seed, exact)
                for s in placement.stages_of(rank)
            }
            trainable = {s: [p for p in _unique(self.stages[s].parameters()) if p.requires_grad] for s in self._runners}
            self._gradients = Gradients(self.world, self._rank_of, trainable, self._ties)
            parameters = self._gradients.optimized
            self.optimizer = optimizer(parameters) if optimizer is not None and parameters else None
            runnable = plans.unfused(plan)  # one device gains nothing from a fused pair
            orders = plans.communicate(runnable)
            tied_edges = self._gradients.edges()
            self._wiring = Wiring(self.world, plan.digest, runnable, orders, self._runners, tied_edges)
            self._times = times_of(self.world.device, observer)
            self._executor = Executor(self.world, runnable, orders[rank], self._runners, self._times)

    @property
    def local_stages(self) -> list[Stage]:
        """The stages that this rank holds, in order."""
        return [runner.stage for _, runner in sorted(self._runners.items())]

    @property
    def peak_activations(self) -> int:
        """Most micro-batches that this rank has held at once (from F to the end of B or W), over its stages."""
        return self._executor.peak_live

    def step(self, batch: Tensor | Sequence[Tensor] | None, target: Tensor | Sequence[Tensor] | None) -> float:
        """One training step: the plan, clipping, the optimizer. Returns the batch's mean loss, the same on every rank.

        Args:
            batch: tensors (N, ...), cut along dimension 0; read on the first stage's rank, may be None elsewhere.
            target: likewise for the last stage's rank.

        Raises:
            InputError: the batch cannot be cut, or has no loss; ConfigMismatch: the ranks were given other batches.
            MessageMismatch: a stage returned another shape or dtype than announced.
            PeerError: another rank ended the run; this rank's parameters are those of the last step boundary.
        """
        with self._together():
            if self.plan.update == "never":
                raise InputError("this pipeline cannot train", got=f"{self.plan.family}, a plan without a backward",
                                 needed="a plan that trains", fix="call evaluate, or build another plan")  # fmt: skip
            if self.optimizer is None and self._gradients.optimized:
                raise InputError("this pipeline cannot train", got="no optimizer", needed="optimizer=factory", fix=
                                 "pass e.g. optimizer=lambda parameters: torch.optim.AdamW(parameters)")  # fmt: skip
            step = self.steps + 1
            data = self._begin(step, batch, target, training=True)
            self._executor.train(data)
            begin = self._phase(step, Phase.REDUCE)
            self._gradients.reduce_ties(step, self._wiring.links)
            self._wiring.links.flush()  # before the exchange: past it, what was received on any rank has really arrived
            loss = self._gradients.exchange(self._loss(), self._clip_norm)
            self._times.finish()
            self._done(begin, step, Phase.REDUCE)
            begin = self._phase(step, Phase.OPTIMIZER)
            if self.optimizer is not None:
                self.optimizer.step()
            self._gradients.clear()
            self.steps = step
            self._executor.reset()
            self._done(begin, step, Phase.OPTIMIZER)
            self.world.at(step, Phase.IDLE)
            return loss

    def evaluate(self, batch: Tensor | Sequence[Tensor] | None, target: Tensor | Sequence[Tensor] | None) -> float:
        """The batch's mean loss in evaluation mode, without gradients; arguments and errors as in ``step``."""
        with self._together():
            modes = [(m, m.training) for stage in self.local_stages for m in stage.modules()]
            for stage in self.local_stages:
                stage.eval()
            try:
                data = self._begin(self.steps + 1, batch, target, training=False)
                self.world.at(self.steps + 1, Phase.EVALUATING)
                self._executor.evaluate(data)
                self._wiring.links.flush()
                loss = self._gradients.exchange(self._loss(), None)
                self._executor.reset()
                self.world.at(self.steps, Phase.IDLE)
                return loss
            finally:
                for module, training in modes:
                    module.training = training

    def save(self, directory: str | os.PathLike[str], meta: dict[str, Any] | None = None) -> None:
        """Collective: writes model and optimizer; the directory's old checkpoint stays until the new one is whole.

        Args:
            meta: anything JSON can hold; ``load`` returns it.

        Raises:
            CheckpointError: it cannot be written; the old checkpoint is untouched.
        """
        with self._together():
            self.world.at(self.steps, Phase.SAVING)
            problem = checkpoint.save(
                self.world, checkpoint.names_of(self.local_stages), self.optimizer, self.steps, directory, meta or {}
            )
            self.world.at(self.steps, Phase.IDLE)
        if problem is not None:
            raise CheckpointError(problem)  # on every rank; the pipeline itself can go on

    def load(self, directory: str | os.PathLike[str]) -> dict[str, Any]:
        """Restores model, optimizer and step count, from any number of ranks. Returns the ``meta`` of ``save``.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model.
        """
        with self._together():
            own, whole = checkpoint.names_of(self.local_stages), checkpoint.names_of(self.stages)
            self.steps, found = checkpoint.load(own, whole, self.optimizer, directory)
            return found

    def close(self) -> None:
        """Frees the buffers between ranks. Safe to repeat; ``pipex.launch`` ends the world itself."""
        self._wiring.close()

    # The start of a step.

    def _begin(self, step: int, batch: Any, target: Any, *, training: bool) -> StepData:
        self.world.at(step, Phase.START)
        runners = self._runners.values()
        first, last = any(runner.first for runner in runners), any(runner.last for runner in runners)
        inputs = None if batch is None else microbatch.as_tensors(batch, "the batch")
        targets = None if target is None else microbatch.as_tensors(target, "the target")
        for name, end, needed, value in (("batch", "first", first, inputs), ("target", "last", last, targets)):
            if needed and not value:
                raise InputError(f"rank {self.world.rank} holds the {end} stage and needs the {name}", got=value)
        said = {
            "the pipeline, counted as they were made": self._number, "step": step,
            "batch": _describe(inputs), "target": _describe(targets),
        }  # fmt: skip
        agreed = agree(self.world, "step" if training else "evaluate", said)
        samples, target_samples = agreed["batch"][0][1][0], agreed["target"][0][1][0]
        if samples != target_samples:
            raise InputError(
                "batch and target disagree", got=f"{samples} and {target_samples} samples", needed="the same number"
            )
        sizes = microbatch.sizes(samples, self.plan.microbatches)
        pieces: list[tuple[Tensor, ...]] = []
        if first and inputs:
            device = self.world.device
            pieces = microbatch.split([t.to(device) for t in inputs], self.plan.microbatches)
        target_pieces: list[Any] = []
        if last and targets:
            cut = microbatch.split([t.to(self.world.device) for t in targets], self.plan.microbatches)
            target_pieces = [t[0] if isinstance(target, Tensor) else t for t in cut]
        samples_of = {n: pieces[sizes.index(n)] if pieces else None for n in sorted(set(sizes), reverse=True)}
        forms = self._wiring.forms(f"{training} {json.dumps(agreed['batch'])}", samples_of)
        self._executor.connect(self._wiring.links)
        return StepData(step, pieces, target_pieces, [n / samples for n in sizes], [forms[n] for n in sizes])

    # Agreement, failure, progress.

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What fails here fails on every rank."""
        if self._failed is not None:
            raise PipexError(f"this pipeline has failed before ({self._failed}); start a new run") from self._failed
        try:
            yield
        except BaseException as error:
            self._failed = error
            self.world.fail(error)
            raise

    def _loss(self) -> float | None:
        """The sum of the weighted losses in rising micro-batch order, on the last stage's rank."""
        runner = next((r for r in self._runners.values() if r.last), None)
        if runner is None:
            return None
        total, *rest = (runner.losses[m] for m in range(self.plan.microbatches))
        for loss in rest:
            total = total + loss
        return total.item()

    def _phase(self, step: int, phase: Phase) -> int:
        self.world.at(step, phase)
        return monotonic_ns()

    def _done(self, begin: int, step: int, phase: Phase) -> None:
        if self._observer is not None:
            self._observer(Event(step, phase.name.lower(), -1, -1, begin, monotonic_ns()))


def _unique(parameters: Iterator[nn.Parameter]) -> list[nn.Parameter]:
    return list(dict.fromkeys(parameters))


def _describe(tensors: Sequence[Tensor] | None) -> list[Any] | None:
    return None if tensors is None else [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
