"""The parameters that this rank trains, seen anew at every step: users freeze, thaw, add and replace them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pipex.partition import Stage
from pipex.runtime import tied
from pipex.runtime.stage_runner import StageRunner


class Trainables:
    """Args:
    stages: all stages of the model.
    runners: those of this rank.
    accumulators: of the parameters that several of its stages hold; as the runners have them.
    """

    def __init__(
        self, stages: Sequence[Stage], runners: Mapping[int, StageRunner], accumulators: tied.Accumulators
    ) -> None:
        self._stages, self._runners, self.accumulators = stages, runners, accumulators
        self.ties = tied.ties_of(stages)
        """the model's tied parameters, the same list on every rank"""
        self._tied: dict[str, nn.Parameter] = {}
        self.look()

    def look(self) -> None:
        """Called by every rank at the beginning of a step.

        Raises:
            UnsupportedModule: a tied parameter was replaced in one of its stages only.
        """
        for runner in self._runners.values():
            runner.look()
        self._tied = {tie.name: tied.parameter_of(tie, self._stages) for tie in self.ties}
        self.accumulators.share({s: runner.survey.parameters for s, runner in self._runners.items()})

    @property
    def every(self) -> list[nn.Parameter]:
        """All parameters here, each once, in model order; frozen ones too."""
        held = [runner.survey.parameters for _, runner in sorted(self._runners.items())]
        return list({id(p): p for parameters in held for p in parameters}.values())

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those that are not frozen: the optimizer's."""
        return [p for p in self.every if p.requires_grad]

    @property
    def owned(self) -> dict[int, list[nn.Parameter]]:
        """By stage, those of ``trained`` that no earlier stage of the model has."""
        found = {}
        for stage, runner in sorted(self._runners.items()):
            others = {id(self._tied[tie.name]) for tie in self.ties if stage in tie.stages[1:]}
            found[stage] = [p for p in runner.survey.parameters if p.requires_grad and id(p) not in others]
        return found

    @property
    def tied(self) -> list[tuple[tied.Tie, nn.Parameter]]:
        """The model's tied parameters that are not frozen, in an order that is the same on every rank."""
        return [(tie, self._tied[tie.name]) for tie in self.ties if self._tied[tie.name].requires_grad]
