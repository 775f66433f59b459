"""The same training in one process, with plain autograd: what a pipeline's numbers are compared with.

No plan, no split backward, no transport: micro-batch by micro-batch through all stages, one ``backward`` each. It
shares with the pipeline only what defines the numbers: how a batch is cut, what a loss function may return, how random
layers are seeded, and that a tied parameter has one accumulator per stage; where there is one, the graph is cut between
stages, as in a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipex.partition import as_stages
from pipex.partition import tied as ties_of_stages
from pipex.partition.own_forward.loss import own_loss
from pipex.plan import Plan
from pipex.runtime import microbatch, tied
from pipex.runtime.aliases import fold
from pipex.runtime.loss import Loss, MicroLoss, of_batch, shares_of
from pipex.runtime.received import Received, seeded
from pipex.runtime.seeding import Seeds


class OneProcess:
    """Arguments as of ``pipex.Pipeline``; of a plan with one copy of the model the number of micro-batches will do."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        plan: Plan | int,
        loss_fn: Any,
        *,
        optimizer: Any = None,
        clip_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        self.stages = as_stages(stages)
        self.steps = 0
        self._microbatches = plan if isinstance(plan, int) else plan.microbatches
        self._groups = [range(plan)] if isinstance(plan, int) else plan.groups
        self._copies = 1 if isinstance(plan, int) else len(plan.placement.pipes)
        self._copy_of: Callable[[int], int] = (lambda m: 0) if isinstance(plan, int) else plan.copy_of
        self._ties = ties_of_stages(self.stages, self._copies)
        self._accumulators = tied.Accumulators()
        self._cuts: list[tuple[tuple[Tensor, ...], Received]] = []  # what each stage but the first got, and as what
        self._loss = Loss(own_loss if loss_fn == "model" else loss_fn)
        if loss_fn == "model":
            self.stages[-1].own_loss = True
        self._counts: list[float | None] = []  # of each forward_backward since the last update
        self._clip_norm = clip_norm
        self._seed = seed
        self.optimizer: torch.optim.Optimizer | None = optimizer(self.trained) if optimizer else None

    @property
    def every(self) -> list[nn.Parameter]:
        """The parameters, each once, in model order."""
        return list(dict.fromkeys(p for stage in self.stages for p in stage.parameters()))

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those that are not frozen."""
        return [p for p in self.every if p.requires_grad]

    def step(self, batch: Any, target: Any = None, *, total: float | None = None) -> float:
        """One training step; returns the batch's mean loss."""
        loss = self.forward_backward(batch, target, total=total)
        self.update()
        return loss

    def forward_backward(self, batch: Any, target: Any = None, *, total: float | None = None) -> float:
        """Adds to the gradients; returns the batch's mean loss."""
        self._loss.trains = bool(self.trained)
        # Each stage of each copy has accumulators of its own.
        pieces = len(self.stages)
        self._accumulators.share({
            copy * pieces + stage.index: list(stage.parameters())
            for copy in range(self._copies) for stage in self.stages
        })  # fmt: skip
        losses = []
        for number, (root, loss) in enumerate(self._losses(batch, target, total)):
            self._backward(root, self._copy_of(number) * pieces)
            losses.append(loss)
        mean, count, _ = of_batch(losses, total)
        self._counts.append(count)
        return mean

    def reduce_gradients(self) -> None:
        """Leaves the gradients of all calls since the last update, not yet clipped, in ``.grad``."""
        for tie in self._ties:
            parameter = tied.parameter_of(tie, dict(enumerate(self.stages * self._copies)))
            parameter.grad = tied.total([self._accumulators.of(stage, parameter) for stage in tie.stages])
        self._accumulators.clear()
        counts = [count for count in self._counts if count is not None]
        if counts:
            for parameter in self.every:
                if parameter.grad is not None:
                    parameter.grad.div_(sum(counts))

    def update(self) -> None:
        """The optimizer's step."""
        self.reduce_gradients()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.every, self._clip_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for stage in self.stages:
            stage.zero_grad()
        self._counts.clear()
        self.steps += 1

    def evaluate(self, batch: Any, target: Any = None) -> float:
        """The batch's mean loss in evaluation mode."""
        for stage in self.stages:
            stage.eval()
        with torch.no_grad():
            mean, *_ = of_batch([loss for _, loss in self._losses(batch, target, None)], None)
        for stage in self.stages:
            stage.train()
        return mean

    def _losses(self, batch: Any, target: Any, total: float | None) -> Iterator[tuple[Tensor, MicroLoss]]:
        """Of one micro-batch after another where its backward starts, and its loss."""
        device = next((p.device for stage in self.stages for p in stage.parameters()), torch.device("cpu"))
        how = microbatch.look(batch, "batch", self._microbatches, fewer=not torch.is_grad_enabled())
        target_how = microbatch.look(target, "target", self._microbatches, fewer=not torch.is_grad_enabled())
        inputs = microbatch.cut(batch, how, len(how.samples), device)
        targets = microbatch.cut(target, target_how, len(how.samples), device)
        self._loss.total = total
        before = len(self._counts) * self._microbatches if torch.is_grad_enabled() else 0
        training = torch.is_grad_enabled()
        shares = shares_of(how.samples, self._groups if training else [range(len(how.samples))])
        seeds = Seeds(device, self._seed)
        with seeds.apart(self.steps + 1, 0):
            for number, (piece, wanted) in enumerate(zip(inputs, targets, strict=True)):
                seed = seeds.of(self.steps + 1, before + number)
                if training:
                    self._before_forward(number)
                output = self._forward(seed, microbatch.as_arguments(piece))
                seed(sum(len(stage.layers) for stage in self.stages))
                yield self._loss(output, wanted, shares[number])

    def _before_forward(self, microbatch: int) -> None:
        """What a training step does before each micro-batch: nothing, where weights change between steps."""

    def _forward(self, seed: Callable[[int], None], inputs: tuple[Any, ...]) -> Any:
        values: Any = inputs
        self._cuts = []
        for stage in self.stages:
            values = values if isinstance(values, tuple) else (values,)
            if self._ties and stage.index and torch.is_grad_enabled():
                sent = tuple(fold(values, self._cuts[-1][1].overlapping if self._cuts else ()))
                received = Received([v.detach().requires_grad_(v.requires_grad) for v in sent], plain=False)
                self._cuts.append((sent, received))
                values = received.handed
            # Seeding a layer that draws nothing changes nothing.
            stage.before_layer = lambda position, first=stage.first_layer: seed(first + position)
            values = stage(*values)
            stage.before_layer = None
        return values

    def _backward(self, loss: Tensor, first_stage: int) -> None:
        """``first_stage``: of the copy."""
        if not self._ties:
            torch.autograd.backward([loss])
            return
        outputs: list[Tensor] = [loss]
        gradients: list[Tensor | None] = [None]
        for stage, (sent, received) in zip(reversed(self.stages), [*reversed(self._cuts), ((), None)], strict=True):
            with self._accumulators.during(first_stage + stage.index):
                if outputs:
                    torch.autograd.backward(outputs, gradients)
            if received is not None:
                found = seeded([v for v in sent if v.requires_grad], received.gradients())
                assert found is not None
                outputs, gradients = list(found[0]), list(found[1])
