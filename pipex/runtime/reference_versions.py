"""One process that trains as a plan with updates within the step does: each micro-batch on the version of each stage's
weights that the plan says, in rising order, with an update behind the last one of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pipex.plan import Plan
from pipex.runtime.loss import of_batch
from pipex.runtime.reference import OneProcess


class OneProcessWithVersions(OneProcess):
    """Arguments as of ``OneProcess``."""

    def __init__(
        self, stages: Sequence[nn.Module], plan: Plan, loss_fn: Any, *, optimizer: Any = None, seed: int = 0
    ) -> None:
        super().__init__(stages, plan, loss_fn, optimizer=optimizer, seed=seed)
        self._plan = plan
        self._versions: dict[nn.Parameter, list[Tensor]] = {}  # from the one before the step's first on

    def resume(self, previous: Mapping[nn.Parameter, Tensor]) -> None:
        """Takes these for the weights before the newest; as of ``Versions``."""
        self._versions = {p: [previous.get(p, p.data), p.data] for p in self.every}

    def step(self, batch: Any, target: Any = None, *, total: float | None = None) -> float:
        """One training step; returns the batch's mean loss."""
        self._loss.trains = bool(self.trained)
        self._versions = {p: [*self._versions.get(p, [p.data])[-2:-1], p.data.clone()] for p in self.every}
        for versions in self._versions.values():
            if len(versions) == 1:  # before the first update of all
                versions *= 2
        losses = []
        ends = {group[-1] for group in self._plan.groups}
        for number, (root, loss) in enumerate(self._losses(batch, target, total)):
            root.backward()  # type: ignore[no-untyped-call]
            losses.append(loss)
            if number in ends:
                self._update()
        self.steps += 1
        return of_batch(losses, None)[0]

    def _before_forward(self, microbatch: int) -> None:
        for stage in self.stages:
            version = self._plan.versions[stage.index, microbatch]
            for parameter in stage.parameters():
                parameter.data = self._versions[parameter][version + 1]

    def _update(self) -> None:
        for parameter, versions in self._versions.items():
            parameter.data = versions[-1].clone()
        if self.optimizer is not None:
            self.optimizer.step()
        for parameter, versions in self._versions.items():
            versions.append(parameter.data)
            parameter.grad = None
