"""The same training in one process, with plain autograd: what a pipeline's numbers are compared with.

No plan, no split backward, no transport: micro-batch by micro-batch through all stages, one ``backward`` each. It
shares with the pipeline only what defines the numbers: how a batch is cut, how random layers are seeded, and that a
tied parameter has one accumulator per stage; where there is one, the graph is cut between stages, as in a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipex.partition import as_stages
from pipex.runtime import microbatch, tied
from pipex.runtime.received import Received, apart
from pipex.runtime.seeding import Seeds


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
        self._ties = tied.ties_of(self.stages)
        self._accumulators = tied.Accumulators()
        self._cuts: list[tuple[tuple[Tensor, ...], Received]] = []  # what each stage but the first got, and as what
        self._microbatches = microbatches
        self._loss_fn = loss_fn
        self._clip_norm = clip_norm
        self._seed = seed
        self.optimizer: torch.optim.Optimizer | None = optimizer(self.trained) if optimizer else None

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are not frozen, in model order."""
        return list(dict.fromkeys(p for stage in self.stages for p in stage.parameters() if p.requires_grad))

    def step(self, batch: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> float:
        """One training step; returns the batch's mean loss."""
        self.gradients(batch, target)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self._clip_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for stage in self.stages:
            stage.zero_grad()
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
        self._accumulators.share({stage.index: list(stage.parameters()) for stage in self.stages})
        total: Tensor | None = None
        for loss in self._losses(batch, target):
            self._backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        self.loss = total.item()
        for tie in self._ties:
            parameter = tied.parameter_of(tie, self.stages)
            if parameter.requires_grad:
                parameter.grad = tied.total([self._accumulators.of(stage, parameter) for stage in tie.stages])
        self._accumulators.clear()

    def _losses(self, batch: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Iterator[Tensor]:
        """The weighted losses, one micro-batch after another."""
        inputs = microbatch.split(microbatch.as_tensors(batch, "the batch"), self._microbatches)
        targets = microbatch.split(microbatch.as_tensors(target, "the target"), self._microbatches)
        samples = sum(piece[0].shape[0] for piece in inputs)
        seeds = Seeds(inputs[0][0].device, self._seed)
        with seeds.apart(self.steps + 1, 0):
            for number, (piece, wanted) in enumerate(zip(inputs, targets, strict=True)):
                seed = seeds.of(self.steps + 1, number)
                output = self._forward(seed, apart(piece))
                seed(sum(len(stage.layers) for stage in self.stages))
                loss = self._loss_fn(output, wanted[0] if isinstance(target, Tensor) else wanted)
                yield loss.reshape(()) * (piece[0].shape[0] / samples)

    def _forward(self, seed: Callable[[int], None], inputs: tuple[Tensor, ...]) -> Any:
        values: Any = inputs
        self._cuts = []
        for stage in self.stages:
            values = values if isinstance(values, tuple) else (values,)
            if self._ties and stage.index and torch.is_grad_enabled():
                received = Received([v.detach().requires_grad_(v.requires_grad) for v in values], plain=False)
                self._cuts.append((values, received))
                values = received.handed
            # Seeding a layer that draws nothing changes nothing.
            stage.before_layer = lambda position, first=stage.first_layer: seed(first + position)
            values = stage(*values)
            stage.before_layer = None
        return values

    def _backward(self, loss: Tensor) -> None:
        if not self._ties:
            torch.autograd.backward([loss])
            return
        outputs: list[Tensor] = [loss]
        gradients: list[Tensor | None] = [None]
        for stage, (sent, received) in zip(reversed(self.stages), [*reversed(self._cuts), ((), None)], strict=True):
            with self._accumulators.during(stage.index):
                if outputs:
                    torch.autograd.backward(outputs, gradients)
            if received is not None:
                outputs, gradients = [v for v in sent if v.requires_grad], list(received.gradients())
