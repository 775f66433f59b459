"""The pipeline: a model's stages on their ranks, trained by a plan."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic_ns
from typing import Any, Literal

from torch import Tensor, nn
from torch.amp import GradScaler

from pipex.observe import Observer
from pipex.plan import Plan
from pipex.runtime import modes
from pipex.runtime.arguments import refuse_asynchronous
from pipex.runtime.loss import LossFunction
from pipex.runtime.parts import assemble
from pipex.runtime.passes import Passes
from pipex.runtime.stale import refuse_stale_saves
from pipex.runtime.update import OptimizerFactory
from pipex.transport.interface import Phase


class Pipeline(Passes):
    """A model in stages, trained step by step. Every rank builds it with the same arguments and calls the same methods.

    ``step`` is ``forward_backward`` and ``update``; several ``forward_backward`` may come before one ``update``.

    The number contract: micro-batch m with n_m of the batch's N samples contributes its mean loss times n_m / N. Where
    ``loss_fn`` returns (sum, count), gradients and loss are those of all sums together, divided by all counts together.
    Sums run in rising micro-batch order per stage, whatever the plan; on the CPU in float32 losses, gradients and
    parameters are bit-equal to ``pipex.runtime.reference`` in one process with the same number of threads.

    A plan with two copies of the model adds up the gradients of a piece's stages in their order. A plan whose weights
    change within a step (``Plan.asynchronous``) has ``step`` alone: each update is of the micro-batches of its group,
    made by every rank for itself, and ``steps`` counts steps.

    Args:
        stages: all stages of the model in order, from ``pipex.split_model`` or any modules that map a tensor (or a
            tuple of tensors) to a tensor (or a tuple); as many as the plan has, in one copy of the model. This rank's
            are kept, and forms of the others. Those on the meta device get memory here, and values by ``load``.
        plan: what every rank does in a step, from ``pipex.plan.build``; proven here before anything runs.
        loss_fn: (output, target) of a micro-batch -> its mean loss, a scalar, or the sum of its losses and their number
            (of tokens that are not ignored, say); runs on the last stage's rank, twice where that is recomputed. Or
            ``"model"``, of stages that run the model's own forward: the loss that this returns, from the labels in the
            batch, as the mean over the tokens of all micro-batches (``pipex.partition.own_forward.loss``).
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
        StageTooLarge: a stage does not fit into its rank's memory.
        ConfigMismatch: the ranks were given different plans or options, or copies of a tied parameter that differ.
        PeerError: another rank ended the run.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        plan: Plan,
        loss_fn: LossFunction | Literal["model"],
        *,
        optimizer: OptimizerFactory | None = None,
        clip_norm: float | None = None,
        scaler: GradScaler | None = None,
        main_weights: bool = False,
        seed: int = 0,
        observer: Observer | None = None,
        exact: bool | None = None,
    ) -> None:
        super().__init__(observer)
        self.plan = plan
        with self._together():
            self._parts = assemble(self.world, stages, plan, loss_fn, optimizer, clip_norm, scaler, main_weights, seed,
                                   observer, exact)  # fmt: skip
        self.layout, self.stages, self._without_values = self._parts.layout, self._parts.stages, self._parts.blank
        if self.world.ranks > 1:
            refuse_stale_saves(self.stages)

    def step(
        self, batch: Any, target: Any = None, *, total: float | Tensor | None = None, skip_nonfinite: bool = False
    ) -> float:
        """``forward_backward`` and ``update``. Returns the batch's mean loss, the same on every rank.

        Args, Raises: as theirs. Of a plan with updates within the step these are all: both options are refused, and a
        step that fails leaves the updates that it has made.
        """
        if self.plan.asynchronous:
            refuse_asynchronous(total=total is not None, skip_nonfinite=skip_nonfinite)
        loss, since = self._train("step", batch, target, total)
        if self.plan.asynchronous:  # the updates are made
            self.steps += 1
            self._done(since, self.steps, Phase.REDUCE)
        else:
            self._finish(since, skip_nonfinite)
        return loss

    def forward_backward(self, batch: Any, target: Any = None, *, total: float | Tensor | None = None) -> float:
        """The plan, without an update. Returns the batch's mean loss, the same on every rank.

        Gradients of several calls before one ``update`` add up, as in torch: divide the loss by their number for the
        mean over equal batches. Sums with counts need no such care: ``update`` divides by the counts of all calls.

        Args:
            batch: a tensor, a tuple of positional or a dict of keyword arguments of the first stage, cut along
                dimension 0, or a list of ready micro-batches (``pipex.runtime.microbatch``); read on the first stage's
                rank (that of each copy), may be None elsewhere.
            target: likewise for the last stage's rank; none where ``loss_fn="model"``.
            total: by which sums of losses are divided before their backward, for the bits of a process that does so;
                the count over all calls before the next update. May be None on ranks that do not hold the last stage.

        Raises:
            InputError: an argument cannot be used, or does not fit the others'; nothing has begun then, and the
                pipeline lives on. The loss function returned what is no loss, or one that nothing can be trained by.
            ConfigMismatch: the ranks were given other batches; nothing has begun.
            MessageMismatch: the ranks do not run one plan.
            PeerError: another rank ended the run; this rank's parameters are those of the last step boundary.
        """
        if self.plan.asynchronous:
            refuse_asynchronous(forward_backward=True)
        loss, since = self._train("forward_backward", batch, target, total)
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
        self._parts.update.check()
        with self._together():
            self.world.at(self.steps + 1, Phase.REDUCE)
            self._parts.update.reduce(self.steps + 1, self._parts.links)

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
        self._parts.update.zero_grad()

    def evaluate(self, batch: Any, target: Any = None) -> float:
        """The batch's mean loss in evaluation mode, without gradients. Arguments as of ``forward_backward``, but there
        may be fewer samples than micro-batches, and any number of ready ones."""
        with modes.evaluation(self.local_stages, self._together):
            return self._evaluate(batch, target)

    def _finish(self, since: int, skip_nonfinite: bool) -> bool:
        self.reduce_gradients()
        with self._together():
            step = self.steps + 1
            self._done(since, step, Phase.REDUCE)
            begin = self._phase(step, Phase.OPTIMIZER)
            made = self._parts.update.apply(skip_nonfinite)
            self.steps += made
            self._done(begin, step, Phase.OPTIMIZER)
            self.world.at(self.steps, Phase.IDLE)
            return made
