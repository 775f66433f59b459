"""The same training in one process, with plain autograd: what a pipeline's numbers are compared with.

No plan, no split backward, no transport: micro-batch by micro-batch through all stages, one ``backward`` each. It
shares with the pipeline only what defines the numbers: how a batch is cut, what a loss function may return, how random
layers are seeded, and that a tied parameter has one accumulator per stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipex.partition import as_stages
from pipex.runtime import microbatch, seeding, tied
from pipex.runtime.loss import Loss, MicroLoss, of_batch


class OneProcess:
    """Arguments as of ``pipex.Pipeline``; ``microbatches`` as the plan has."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        microbatches: int,
        loss_fn: Any,
        *,
        optimizer: Any = None,
        clip_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        self.stages = as_stages(stages)
        self.steps = 0
        self._ties = tied.separate(self.stages)
        self._microbatches = microbatches
        self._loss = Loss(loss_fn, lambda: bool(self._all))
        self._counts: list[float | None] = []  # of each forward_backward since the last update
        self._clip_norm = clip_norm
        self._seed = seed
        self._all = list(dict.fromkeys(p for s in self.stages for p in s.parameters() if p.requires_grad))
        copies = {id(r) for tie in self._ties for r in tie.replicas[1:]}
        self._optimized = [p for p in self._all if id(p) not in copies]
        self.optimizer: torch.optim.Optimizer | None = optimizer(self._optimized) if optimizer else None

    def step(self, batch: Any, target: Any, *, total: float | None = None) -> float:
        """One training step; returns the batch's mean loss."""
        loss = self.forward_backward(batch, target, total=total)
        self.update()
        return loss

    def forward_backward(self, batch: Any, target: Any, *, total: float | None = None) -> float:
        """Adds to the gradients; returns the batch's mean loss."""
        losses = []
        for root, loss in self._losses(batch, target, total):
            torch.autograd.backward([root])
            losses.append(loss)
        mean, count = of_batch(losses, total)
        self._counts.append(count)
        return mean

    def reduce_gradients(self) -> None:
        """Leaves the gradients of all calls since the last update, not yet clipped, in ``.grad``."""
        for tie in self._ties:
            accumulators = [tied.accumulator(replica) for replica in tie.replicas]
            for replica in tie.replicas:
                replica.grad = None
            tie.replicas[0].grad = tied.total(accumulators)
        counts = [count for count in self._counts if count is not None]
        if counts:
            for parameter in self._optimized:
                if parameter.grad is not None:
                    parameter.grad.div_(sum(counts))

    def update(self) -> None:
        """The optimizer's step."""
        self.reduce_gradients()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._optimized, self._clip_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for parameter in self._all:
            parameter.grad = None
        self._counts.clear()
        self.steps += 1

    def evaluate(self, batch: Any, target: Any) -> float:
        """The batch's mean loss in evaluation mode."""
        for stage in self.stages:
            stage.eval()
        with torch.no_grad():
            mean, _ = of_batch([loss for _, loss in self._losses(batch, target, None)], None)
        for stage in self.stages:
            stage.train()
        return mean

    def _losses(self, batch: Any, target: Any, total: float | None) -> Iterator[tuple[Tensor, MicroLoss]]:
        """Of one micro-batch after another where its backward starts, and its loss."""
        device = next(iter(self._all), torch.empty(0)).device
        how = microbatch.look(batch, "batch", self._microbatches, fewer=not torch.is_grad_enabled())
        target_how = microbatch.look(target, "target", self._microbatches, fewer=not torch.is_grad_enabled())
        inputs = microbatch.cut(batch, how, len(how.samples), device)
        targets = microbatch.cut(target, target_how, len(how.samples), device)
        self._loss.total = total
        for number, (piece, wanted) in enumerate(zip(inputs, targets, strict=True)):
            output = self._forward(number, microbatch.as_arguments(piece), device)
            yield self._loss(output, wanted, how.samples[number] / sum(how.samples))

    def _forward(self, number: int, values: Any, device: torch.device) -> Any:
        number += len(self._counts) * self._microbatches
        for stage in self.stages:
            seeds = seeding.of_layers(device, self._seed, self.steps + 1, number, stage.first_layer)
            # Seeding a layer that draws nothing changes nothing.
            values = stage.run(values if isinstance(values, tuple) else (values,), seeds)
        return values
