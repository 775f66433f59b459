"""The same training in one process, with plain autograd: what a pipeline's numbers are compared with.

No plan, no split backward, no transport: micro-batch by micro-batch through all stages, one ``backward`` each. It
shares with the pipeline only what defines the numbers: how a batch is cut, how random layers are seeded, and that a
tied parameter has one accumulator per stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipex.partition import as_stages
from pipex.runtime import microbatch, seeding, tied


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
        self._loss_fn = loss_fn
        self._clip_norm = clip_norm
        self._seed = seed
        self._all = list(dict.fromkeys(p for s in self.stages for p in s.parameters() if p.requires_grad))
        copies = {id(r) for tie in self._ties for r in tie.replicas[1:]}
        self._optimized = [p for p in self._all if id(p) not in copies]
        self.optimizer: torch.optim.Optimizer | None = optimizer(self._optimized) if optimizer else None

    def step(self, batch: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> float:
        """One training step; returns the batch's mean loss."""
        self.gradients(batch, target)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._optimized, self._clip_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for parameter in self._all:
            parameter.grad = None
        self.steps += 1
        return self.loss

    def evaluate(self, batch: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> float:
        """The batch's mean loss in evaluation mode."""
        for stage in self.stages:
            stage.eval()
        with torch.no_grad():
            loss = sum(self._losses(batch, target))
        for stage in self.stages:
            stage.train()
        return float(loss)

    def gradients(self, batch: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> None:
        """Leaves the step's gradients, not yet clipped, in ``.grad`` and its loss in ``loss``."""
        total: Tensor | None = None
        for loss in self._losses(batch, target):
            torch.autograd.backward([loss])
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        self.loss = total.item()
        for tie in self._ties:
            accumulators = [tied.accumulator(replica) for replica in tie.replicas]
            for replica in tie.replicas:
                replica.grad = None
            tie.replicas[0].grad = tied.total(accumulators)

    def _losses(self, batch: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Iterator[Tensor]:
        """The weighted losses, one micro-batch after another."""
        inputs = microbatch.split(microbatch.as_tensors(batch, "the batch"), self._microbatches)
        targets = microbatch.split(microbatch.as_tensors(target, "the target"), self._microbatches)
        samples = sum(piece[0].shape[0] for piece in inputs)
        for number, (piece, wanted) in enumerate(zip(inputs, targets, strict=True)):
            output = self._forward(number, piece)
            loss = self._loss_fn(output, wanted[0] if isinstance(target, Tensor) else wanted)
            yield loss.reshape(()) * (piece[0].shape[0] / samples)

    def _forward(self, number: int, inputs: tuple[Tensor, ...]) -> Any:
        device = inputs[0].device
        values: Any = inputs
        for stage in self.stages:
            seeds = seeding.of_layers(device, self._seed, self.steps + 1, number, stage.first_layer)
            # Seeding a layer that draws nothing changes nothing.
            values = stage.run(values if isinstance(values, tuple) else (values,), seeds)
        return values
