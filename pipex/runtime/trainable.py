"""The parameters that this rank trains, seen anew at every step: users freeze, thaw, add and replace them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import is_

from torch import nn

from pipex.errors import UnsupportedModule
from pipex.layout import Tie
from pipex.runtime import tied
from pipex.runtime.elsewhere import Copy, Elsewhere
from pipex.runtime.stage_runner import StageRunner


class Trainables:
    """Args:
    ties: the model's tied parameters.
    runners: the stages of this rank.
    accumulators: of the parameters that several of these hold; as the runners have them.
    elsewhere: the other ranks' stages.
    copies: whether there are several copies of the model, and so a tie for every parameter.
    """

    def __init__(
        self, ties: Sequence[Tie], runners: Mapping[int, StageRunner], accumulators: tied.Accumulators,
        elsewhere: Elsewhere, copies: bool,
    ) -> None:  # fmt: skip
        self._runners, self.accumulators, self._elsewhere, self._copies = runners, accumulators, elsewhere, copies
        self._stages = {stage: runner.stage for stage, runner in runners.items()}
        self._in_order = sorted(runners.values(), key=lambda runner: runner.stage.index)
        self.ties = [tie for tie in ties if not runners.keys().isdisjoint(tie.stages)]
        """the tied parameters that this rank has, in an order that is the same on every rank"""
        self.said: dict[str, object] = {}
        """what this rank tells the others at the beginning of a step"""
        self._tied: dict[str, nn.Parameter] = {}
        self._replaced = dict.fromkeys((tie.name for tie in self.ties), -1)  # how often; not by the first
        self._at_begin: set[str] = set()  # names of those that are trained in the step at hand
        self._summed: set[str] = set()  # and in any step since the last update, which adds them up
        self._held: dict[int, list[nn.Parameter]] = {}  # by stage of this rank
        self._here: set[int] = set()  # the ids of these
        self.look()

    def look(self, training: bool = True) -> None:
        """Called by every rank at the beginning of a step, or of an evaluation.

        Raises:
            UnsupportedModule: a tied parameter was replaced in one of its stages only, or has hooks; or one was tied
                just now.
        """
        for runner in self._runners.values():
            runner.look()
        for tie in self.ties:
            parameter = tied.parameter_of(tie, self._stages)
            self._replaced[tie.name] += parameter is not self._tied.get(tie.name)
            self._tied[tie.name] = parameter
        held = {s: runner.survey.parameters for s, runner in self._runners.items()}
        if not all(s in self._held and _same(parameters, self._held[s]) for s, parameters in held.items()):
            self._elsewhere.look()
            tied.refuse_new(self._stages.values(), self._elsewhere, self.ties, self._tied, self._copies)
            self._held = held
            self._here = {id(parameter) for parameters in held.values() for parameter in parameters}
            self.accumulators.share(held)
            for copy in self._strays():  # left from before: of no use here, as the parameter is not updated
                copy.parameter.grad = None
        self.said = self._trained_ties() if self.ties and training else {}

    def _trained_ties(self) -> dict[str, object]:
        """By stages that share them, the names of the tied parameters that are trained: these stages' ranks exchange
        their gradients."""
        self._at_begin.clear()
        trained: dict[str, list[str]] = {}
        replaced: dict[str, dict[str, int]] = {}
        for tie in self.ties:
            if self._tied[tie.name].requires_grad:
                tied.refuse_hooks(tie, self._tied[tie.name])
                self._at_begin.add(tie.name)
            names = trained.setdefault(f"which parameters of the stages {tie.between} are trained", [])
            if tie.name in self._at_begin | self._summed:
                names.append(tie.name)
            times = replaced.setdefault(f"how often parameters of the stages {tie.between} were replaced", {})
            times[tie.name] = self._replaced[tie.name]
        return {**trained, **replaced}

    def backward_done(self) -> None:
        """Called by every rank when the backwards of a step are done.

        Raises:
            UnsupportedModule: this rank's copy of another rank's parameter has got a gradient. The copy is never
                updated, so this would be lost, and was made with the value of the beginning.
        """
        self._summed |= self._at_begin
        for copy in self._strays():
            raise UnsupportedModule(
                f"{copy.called()} got a gradient on a rank without its stage {copy.stage.index}, where it would be "
                "lost",
                got="a use outside of its stage, as by a penalty over all parameters in the loss, or a backward "
                "outside of the pipeline",
                needed="uses by layers that have it among their parameters",
                fix="register it in the layer that uses it, before the model is cut; hand a penalty on as an output "
                "of its stage; empty .grad before a step",
            )

    def _strays(self) -> Iterator[Copy]:
        """What has a gradient here, though only other ranks train it."""
        for copy in self._elsewhere.parameters():
            if copy.parameter.grad is not None and id(copy.parameter) not in self._here:
                yield copy

    @property
    def every(self) -> list[nn.Parameter]:
        """All parameters here, each once, in model order; frozen ones too."""
        held = [runner.survey.parameters for runner in self._in_order]
        return list({id(p): p for parameters in held for p in parameters}.values())

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those that are not frozen: the optimizer's."""
        return [p for p in self.every if p.requires_grad]

    @property
    def owned(self) -> dict[int, list[nn.Parameter]]:
        """By stage, those of ``every`` that no earlier stage of the model has."""
        found = {}
        for stage, runner in sorted(self._runners.items()):
            others = {id(self._tied[tie.name]) for tie in self.ties if stage in tie.stages[1:]}
            found[stage] = [p for p in runner.survey.parameters if id(p) not in others]
        return found

    @property
    def tied(self) -> list[tuple[Tie, nn.Parameter]]:
        """Those of ``ties`` that were trained in a step since ``forget``; as the ranks have agreed on at its beginning,
        whatever was frozen since."""
        return [(tie, self._tied[tie.name]) for tie in self.ties if tie.name in self._summed]

    def forget(self) -> None:
        """The gradients are gone."""
        self.accumulators.clear()
        self._summed.clear()


def _same(some: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))
