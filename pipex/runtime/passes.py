"""One pass over a batch: what it is given is agreed on, the plan runs, and all ranks learn the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipex.backward.waiting import warn_if_few_wait
from pipex.errors import PipexError
from pipex.runtime import intake, microbatch
from pipex.runtime.agreement import share
from pipex.runtime.executor import StepData
from pipex.runtime.loss import BatchLoss, of_batch, said_of, shares_of, told
from pipex.runtime.session import Session
from pipex.transport.interface import Phase


class Passes(Session):
    """A session that can run its plan."""

    _judged = False  # whether it is known how many of the weight gradients wait

    def _train(self, call: str, batch: Any, target: Any, total: object) -> tuple[float, int]:
        """Forwards and backwards. Returns the mean loss, and since when this rank has been done with its actions.

        Args:
            call: what the user has called.
        """
        data = self._begin(call, batch, target, total)
        parts = self._parts
        with self._together():
            with parts.seeds.apart(data.step, self.world.rank):
                parts.executor.train(data)
            parts.trainables.backward_done()
            if not self._judged:
                self._judged = warn_if_few_wait(runner.waiting for runner in parts.runners.values())
            since = self._phase(data.step, Phase.REDUCE)
            loss = self._end()
            parts.times.finish()
            if not parts.layout.plan.asynchronous:  # which has made its updates
                parts.update.add(loss, parts.loss.total)
            self.world.at(self.steps, Phase.IDLE)
            return loss.mean, since

    def _evaluate(self, batch: Any, target: Any) -> float:
        """Forwards alone. Returns the mean loss."""
        data = self._begin("evaluate", batch, target, None)
        with self._together():
            self.world.at(data.step, Phase.EVALUATING)
            with self._parts.seeds.apart(data.step, self.world.rank):
                self._parts.executor.evaluate(data)
            loss = self._end()
            self.world.at(self.steps, Phase.IDLE)
            return loss.mean

    def _begin(self, call: str, batch: Any, target: Any, total: object) -> StepData:
        """Agrees on what is to be done. What goes wrong afterwards, before the return, has begun nothing."""
        self._check_alive(buffers=True, values=True)
        parts, world = self._parts, self.world
        step, training = self.steps + 1, call != "evaluate"
        plan, update = parts.layout.plan, parts.update
        with self._together():
            world.at(step, Phase.START)
            parts.trainables.look(training)
            runners = parts.runners.values()
            for runner in runners:
                runner.microbatches_before = len(update.counts) * plan.microbatches if training else 0
            first = next((runner.stage for runner in runners if runner.first), None)
            last = any(runner.last for runner in runners)
            given = intake.take(world, plan, batch, target, total, first=first, last=last,
                                training=training, own_loss=parts.loss.is_models)  # fmt: skip
            if training:
                intake.refuse_training(given, plan, update, bool(parts.trainables.trained))
            every = share(world, call, {"the pipeline, counted as they were made": parts.number, "step": step,
                                        **parts.trainables.said, **given.said})  # fmt: skip
        try:
            agreed = intake.agreed(plan.microbatches, given, every)
            update.check_total(agreed.total, training)
        except PipexError:
            world.at(self.steps, Phase.IDLE)
            raise
        parts.loss.total, parts.loss.trains = agreed.total, agreed.trains
        count = len(agreed.samples)
        inputs: Sequence[tuple[Any, ...]] = ()
        targets: Sequence[Any] = [None] * count  # of a model that makes its loss itself
        with self._together():
            if first is not None and given.batch is not None:
                pieces = microbatch.cut(batch, given.batch, count, world.device)
                inputs = [microbatch.as_arguments(piece) for piece in pieces]
            if last and given.target is not None:
                targets = microbatch.cut(target, given.target, count, world.device)
        groups = plan.groups if training else [range(count)]
        return StepData(step, inputs, targets, shares_of(agreed.samples, groups))

    def _end(self) -> BatchLoss:
        """Collective: the loss of what the executor has run."""
        parts = self._parts
        parts.links.flush()  # before the exchange: past it, what was received on any rank has really arrived
        mine = {m: loss for runner in parts.runners.values() for m, loss in runner.losses.items()}
        parts.executor.reset()
        if len(parts.layout.target_ranks) > 1:  # the losses are in several places
            every = share(self.world, "the losses", said_of(mine))
            return of_batch(told([loss for rank in every for loss in rank]), parts.loss.total)
        found = of_batch([mine[m] for m in sorted(mine)], parts.loss.total) if mine else None
        mean, divisor, counts = next(filter(None, share(self.world, "the losses", found)))
        return BatchLoss(float(mean), divisor, counts)
