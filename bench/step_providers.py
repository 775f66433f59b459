"""The three ways in which ``bench.step`` runs a step, and ``bench.overlap`` one that torch runs. Each is built on every
rank and returns this rank's gradients."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from pipex.bench.torch_schedules import torch_schedule
from pipex.plan import Kind, Plan
from pipex.runtime.loss import LossFunction
from pipex.runtime.pipeline import Pipeline
from pipex.runtime.update import Parameters


class _KeepGradients(torch.optim.Optimizer):
    """Updates nothing. ``gradients`` are those of the last step."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad for group in self.param_groups for p in group["params"]]


class PipexStep:
    """``pipex.Pipeline``, on the arguments of its ``step``.

    Attributes:
        names: of this rank's parameters, in the order of their gradients.
        loss: of the last step.
    """

    def __init__(
        self, stages: Sequence[nn.Module], plan: Plan, *data: Any,
        loss_fn: LossFunction | Literal["model"] = nn.functional.mse_loss,
    ) -> None:  # fmt: skip
        self._pipeline = Pipeline(stages, plan, loss_fn, optimizer=self._optimizer)
        self._data = data
        self.loss: float | None = None
        self.close = self._pipeline.close

    def _optimizer(self, parameters: Parameters) -> _KeepGradients:
        self.names = [name for name, _ in parameters.named]
        return _KeepGradients(parameters)

    def run(self) -> list[Tensor]:
        self.loss = self._pipeline.step(*self._data)
        assert isinstance(self._pipeline.optimizer, _KeepGradients)
        return self._pipeline.optimizer.gradients


class TorchStep:
    """torch.distributed.pipelining on its default group: the schedule that stands beside the one of this name. The loss
    is collected, outputs are not.

    Attributes:
        parameters: of this rank's stages.
        loss: of the last step, on the last stage's rank; None elsewhere.
    """

    def __init__(
        self, stages: Sequence[nn.Module], schedule: str, plan: Plan, rank: int, batch: Tensor, target: Tensor,
        loss_fn: LossFunction = nn.functional.mse_loss,
    ) -> None:  # fmt: skip
        mine = plan.placement.stages_of(rank)
        modules = {index: stages[index].to(batch.device) for index in mine}
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.loss: float | None = None
        torch_stages = [PipelineStage(module, index, len(stages), batch.device) for index, module in modules.items()]
        self._schedule = torch_schedule(schedule, torch_stages, plan.microbatches, loss_fn)
        self._inputs = (batch,) if 0 in mine else ()
        self._target = target if len(stages) - 1 in mine else None

    def run(self) -> list[Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        losses: list[Tensor] = []
        self._schedule.step(*self._inputs, target=self._target, losses=losses, return_outputs=False)
        if losses:
            self.loss = torch.stack(losses).mean().item()  # pipex's step returns it too
        return [p.grad for p in self.parameters if p.grad is not None]


class ComputeAlone:
    """This rank's stage on inputs and output gradients that are there already, in the order of its actions.

    Attributes:
        microseconds: per kind of action, the mean time of one in each run.
    """

    def __init__(self, stages: Sequence[nn.Module], plan: Plan, rank: int, batch: Tensor, target: Tensor) -> None:
        self._stage = stages[rank]
        self._parameters = list(self._stage.parameters())
        self._order = plan.orders[rank]
        self._share = 1 / plan.microbatches
        self._targets = target.chunk(plan.microbatches) if rank == len(stages) - 1 else None
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self.microseconds: dict[str, list[float]] = {kind: [] for kind in ("F", "B")}
        for inputs, wanted in zip(batch.chunk(plan.microbatches), target.chunk(plan.microbatches), strict=True):
            values = [inputs]
            for stage in stages:
                values.append(stage(values[-1]).detach().requires_grad_())
            outputs = values[rank + 1]
            loss = nn.functional.mse_loss(nn.Sequential(*stages[rank + 1 :])(outputs), wanted) * self._share
            self._inputs.append(values[rank])
            self._gradients += torch.autograd.grad(loss, outputs)

    def run(self) -> list[Tensor]:
        for parameter in self._parameters:
            parameter.grad = None
        roots: dict[int, Tensor] = {}
        spent = dict.fromkeys(self.microseconds, 0.0)
        for action in self._order:
            microbatch, begin = action.microbatch, perf_counter()
            if action.kind is Kind.F:
                inputs = self._inputs[microbatch].detach()
                output = self._stage(inputs.requires_grad_(self._inputs[microbatch].requires_grad))
                if self._targets is not None:
                    output = nn.functional.mse_loss(output, self._targets[microbatch]) * self._share
                roots[microbatch] = output
            elif self._targets is not None:
                roots.pop(microbatch).backward()  # type: ignore[no-untyped-call]
            else:
                roots.pop(microbatch).backward(self._gradients[microbatch])  # type: ignore[no-untyped-call]
            spent[action.kind.value] += perf_counter() - begin
        for kind, seconds in spent.items():
            self.microseconds[kind].append(seconds / len(self._inputs) * 1e6)
        return [p.grad for p in self._parameters if p.grad is not None]
