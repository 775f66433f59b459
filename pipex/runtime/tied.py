"""Parameters that stand in several stages: an embedding tied to the output head, or a module that is used twice.

Each stage accumulates a gradient of its own; at the end of a step these are added in stage order, once, and every rank
that holds the parameter makes the same optimizer step with the sum. So the sum's bits do not depend on the schedule or
on where the stages live.

A parameter stays one object, and so do the modules that hold it: what a module keeps (buffers, counters) is then the
same for all of its uses on a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, reduce
from operator import add

from torch import Tensor, nn

from pipex.errors import MessageMismatch, UnsupportedModule
from pipex.layout import Tie
from pipex.partition import Stage
from pipex.runtime.elsewhere import Elsewhere
from pipex.runtime.received import is_gradient, no_gradient
from pipex.torch_internals import hooks_of, post_accumulate_hooks


def parameter_of(tie: Tie, stages: Mapping[int, Stage]) -> nn.Parameter:
    """The parameter as it is now in those of its stages that are given; users may replace it between steps.

    Raises:
        UnsupportedModule: its stages hold several by now.
    """
    first, *others = (stages[holder].parameter(tie.name) for holder in tie.stages if holder in stages)
    if any(other is not first for other in others):
        raise UnsupportedModule(
            f"{tie.name} was one parameter of the stages {tie.between} when the pipeline was made",
            got="several parameters", needed="one, whose gradients are added",
            fix="replace it in all of these stages, or make a new pipeline",
        )  # fmt: skip
    return first


def refuse_hooks(tie: Tie, parameter: nn.Parameter) -> None:
    """Raises UnsupportedModule if the parameter has some: in one process they see the sum of its uses, here no hook
    can."""
    if hooks_of(parameter) or post_accumulate_hooks(parameter):
        raise UnsupportedModule(
            f"{tie.name} stands in the stages {tie.between}, and its hooks would see the gradient of one of them at a "
            "time", got="a hook on the parameter", needed="none while it is trained",
            fix="change its gradient between reduce_gradients() and update()",
        )  # fmt: skip


def name_in(stage: Stage, parameter: nn.Parameter) -> str:
    """What a parameter of the stage is called, one that was added to it too."""
    for name, tensor in (*stage.names.items(), *stage.named_parameters(prefix=f"stage {stage.index}")):
        if tensor is parameter:
            return name
    return "a parameter"


def refuse_new(
    stages: Iterable[Stage], elsewhere: Elsewhere, ties: Sequence[Tie], parameters: Mapping[str, nn.Parameter],
    copies: bool,
) -> None:  # fmt: skip
    """Raises UnsupportedModule if several stages hold a parameter that was not among the ties.

    Args:
        stages: this rank's.
        parameters: of the ties, by name.
        copies: whether another stage has a copy of whatever is in one.
    """
    known = {id(parameters[tie.name]): set(tie.stages) for tie in ties}
    holders: dict[int, dict[int, Callable[[], str]]] = {}  # by stage, its name there
    for stage in stages:
        for parameter in stage.parameters():
            holders.setdefault(id(parameter), {})[stage.index] = partial(name_in, stage, parameter)
    for copy in elsewhere.parameters():
        if id(copy.parameter) in holders:
            holders[id(copy.parameter)].setdefault(copy.stage.index, copy.called)
    for key, names in holders.items():
        indices = sorted(names)
        if len(indices) > 1 and not known.get(key, set()).issuperset(indices):
            raise UnsupportedModule(
                f"{names[indices[0]]()} was tied when the model was in stages already",
                got=f"one parameter of the stages {', '.join(map(str, indices))}",
                needed="ties that the pipeline knows of, whose gradients are added",
                fix="tie parameters first, then cut the model and make the pipeline",
            )  # fmt: skip
        if copies and key not in known:
            raise UnsupportedModule(
                f"{names[indices[0]]()} was added when there were copies of the model already",
                got="a parameter of which the other copy's rank may know nothing",
                needed="those that were there when the pipeline was made, whose gradients are added",
                fix="add it first, then make the pipeline; or run a plan with one copy of the model",
            )  # fmt: skip


class Accumulators:
    """One gradient per stage for the parameters that several stages of this process hold.

    A parameter has one ``.grad``: it is that of the first of these stages, and of another one during its backward.
    """

    def __init__(self) -> None:
        self._later: dict[int, list[nn.Parameter]] = {}  # by stage, what an earlier stage here holds too
        self._aside: dict[tuple[int, int], Tensor | None] = {}  # by stage and id of the parameter

    def share(self, parameters: Mapping[int, Sequence[nn.Parameter]]) -> None:
        """Takes the parameters of each stage here."""
        known: set[int] = set()
        self._later = {}
        for stage, held in sorted(parameters.items()):
            if again := [parameter for parameter in held if id(parameter) in known]:
                self._later[stage] = again
            known.update(map(id, held))

    def during(self, stage: int) -> AbstractContextManager[None]:
        """Around each backward of the stage, whole or half."""
        return self._swapped(stage) if stage in self._later else _NOTHING

    @contextmanager
    def _swapped(self, stage: int) -> Iterator[None]:
        self._swap(stage)
        try:
            yield
        finally:
            self._swap(stage)

    def _swap(self, stage: int) -> None:
        for parameter in self._later[stage]:
            key = stage, id(parameter)
            parameter.grad, self._aside[key] = self._aside.get(key), parameter.grad

    def of(self, stage: int, parameter: nn.Parameter) -> Tensor | None:
        """What the stage has accumulated; None where no use of the parameter got a gradient."""
        later = any(parameter is held for held in self._later.get(stage, ()))
        return self._aside.get((stage, id(parameter))) if later else parameter.grad

    def clear(self) -> None:
        """Forgets what is not in ``.grad``."""
        self._aside.clear()


_NOTHING = nullcontext()


def total(accumulators: Sequence[Tensor | None]) -> Tensor | None:
    """The sum in stage order, of the stages that have a gradient. None if none has, as in torch: an optimizer leaves
    out what has no gradient, while zeros would let momentum and weight decay move it."""
    found = [gradient for gradient in accumulators if gradient is not None]
    if len(found) == 1:
        return found[0].clone()  # it may lie in the memory of a message
    return reduce(add, found) if found else None


def packed(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    """As it goes into a message."""
    return no_gradient(parameter.device) if gradient is None else gradient


def unpacked(tensor: Tensor, parameter: nn.Parameter) -> Tensor | None:
    """The gradient that was packed.

    Raises:
        MessageMismatch: it is that of a parameter of another shape.
    """
    if not is_gradient(tensor):
        return None
    if tensor.shape == parameter.shape:
        return tensor
    raise MessageMismatch(
        "a tied parameter has another shape on another rank", got=f"a gradient of shape {list(tensor.shape)}",
        needed=f"{list(parameter.shape)}", fix="replace a tied parameter on all ranks alike",
    )  # fmt: skip
