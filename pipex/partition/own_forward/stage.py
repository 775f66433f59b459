"""A stage that runs the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pipex.errors import InputError, UnsupportedModule
from pipex.hugging_face.conventions import samples_elsewhere
from pipex.partition.own_forward.arguments import Arguments, form_of
from pipex.partition.own_forward.crossing import Crossing, Form, Leaf
from pipex.partition.own_forward.gates import Left
from pipex.partition.own_forward.loss import Means
from pipex.partition.own_forward.rehearsal import Need
from pipex.partition.own_forward.stage_tree import Places, StageTree
from pipex.partition.own_forward.units import Unit
from pipex.partition.stage import Keywords, Stage, introduce


@dataclass(frozen=True, slots=True)
class Course:
    """A model's forward, as all its stages know it.

    Attributes:
        arguments: of it.
        chain: its calls.
        units: of them, ranges.
        needs: of each unit.
        places: what stands where.
        loss_seen: whether the sample's forward has returned a loss.
    """

    arguments: Arguments
    chain: tuple[Form, ...]
    units: tuple[range, ...]
    needs: tuple[Need, ...]
    places: Places
    loss_seen: bool


@dataclass(frozen=True, slots=True)
class Message:
    """What a stage gets from the one before: tensors in this order.

    Attributes:
        batch: how many the batch has.
        made: by calls of earlier stages, with values.
        forms: likewise, without.
    """

    batch: int
    made: tuple[Leaf, ...]
    forms: tuple[Leaf, ...]

    @classmethod
    def to(cls, course: Course, unit: int) -> Message:
        """To a stage that begins with the unit."""
        begin = course.units[unit].start
        later = course.needs[unit:]
        made = {leaf for need in later for leaf in need.made if leaf.call < begin}
        forms = {leaf for need in later for leaf in need.forms if leaf.call < begin} - made
        return cls(len(course.arguments.tensors), tuple(sorted(made)), tuple(sorted(forms)))


@dataclass(frozen=True, slots=True)
class Verified:
    """What was compared with the unsplit model, forward and backward on the sample.

    Attributes:
        outputs: how many tensors the model returns. All of them had the same bits.
        gradients: how many parameters get a gradient. All but those of ``rounded`` had the same bits.
        rounded: by name how far gradients were off, relative to their norm, to which stages add in another order.
    """

    outputs: int
    gradients: int
    rounded: Mapping[str, float]


class ModelStage(Stage):
    """Units ``first_layer`` to ``first_layer + len(layers) - 1`` of a model, run by the model's own forward."""

    draws_between = True

    def __init__(
        self, index: int, count: int, first_layer: int, units: Sequence[Unit], model: nn.Module, course: Course
    ) -> None:
        super().__init__(index, count, first_layer, units, model)
        self._course = course
        self.loss_seen = course.loss_seen
        last = first_layer + len(units)
        self._gets = Message.to(course, first_layer) if first_layer else None
        self._sends = Message.to(course, last) if last < len(course.units) else None
        self._wanted = _by_call((*self._sends.made, *self._sends.forms) if self._sends else ())
        self._tree: StageTree | None = None
        self.verified: Verified | None = None
        """what was compared with the unsplit model, if it was"""

    @property
    def begin(self) -> str:
        """The path of the first module that it calls."""
        return self._course.chain[self._course.units[self.first_layer].start].path

    @property
    def behind(self) -> int:
        """As of ``Stage``: behind the code that follows the last call."""
        return len(self._course.chain) + 1

    def check_inputs(self, inputs: tuple[Any, ...], *, whole: bool) -> None:
        """As of ``Stage``."""
        self._course.arguments.of(inputs)
        named = inputs[-1] if inputs and isinstance(inputs[-1], Keywords) else {}
        if whole and (name := samples_elsewhere(named)):
            raise InputError(
                f"{name} has the samples in another dimension than the first", got=f"shape {list(named[name].shape)}",
                needed="samples first, or micro-batches that are ready", fix="pass a list of ready micro-batches",
            )  # fmt: skip

    def forward(self, *inputs: Any) -> Any:
        """What the next stage gets; on the last one what the model returns, or its loss if that is asked for.

        Args:
            inputs: of the first stage the batch, of others the tensors that the stage before returned.

        Raises:
            InputError: the batch is not like the sample, or the model has returned no loss for it.
            UnsupportedModule: the model's forward has taken another way than with the sample.
        """
        course = self._course
        received: dict[Leaf, Tensor] = {}
        if self._gets is None:
            batch: Sequence[Tensor] = course.arguments.of(inputs)
        else:
            batch = inputs[: self._gets.batch]
            received = dict(zip((*self._gets.made, *self._gets.forms), inputs[self._gets.batch :], strict=True))
        tree = self._tree
        device = next((parameter.device for parameter in self.parameters()), batch[0].device)
        if tree is None or tree.device != device:
            tree = self._tree = self._grow(device)
        tree.follow(any(module.training for unit in self.layers for module in unit.children()))
        end = self.first_layer + len(self.layers)
        crossing = Crossing(
            course.chain, course.units[self.first_layer].start, course.units[end - 1].stop, received,
            self._wanted, tree.nothing, self._seed_of(self.before_layer),
        )  # fmt: skip
        means = Means()
        if crossing.seed is not None:
            crossing.seed(0)
        args, kwargs = course.arguments.call(batch)
        tree.cross(crossing)
        with ExitStack() as end_of_forward:
            if self.own_loss:
                crossing.at_end = lambda: end_of_forward.enter_context(means)
            try:
                output = tree.root(*args, **kwargs)
            except Left:
                return self._message(batch, received | crossing.made)
            finally:
                tree.cross(None)
        if self._sends is not None:
            raise UnsupportedModule(
                f"the model's forward ended before {course.chain[crossing.end - 1].path}", got="fewer calls",
                needed="the calls of the sample's", fix="split the model with a sample that is like the batches",
            )  # fmt: skip
        return means.of(output) if self.own_loss else output

    def without_layers(self, layers: nn.ModuleList) -> Stage:
        """As of ``Stage``."""
        found = super().without_layers(layers)
        vars(found)["_tree"] = None  # which holds what the stage has
        return found

    def _message(self, batch: Sequence[Tensor], there: Mapping[Leaf, Tensor]) -> tuple[Tensor, ...]:
        sends = self._sends
        assert sends is not None, "the last stage does not leave"
        return (
            *batch,
            *(there[leaf] for leaf in sends.made),
            *(form_of(there[leaf]) for leaf in sends.forms),
        )

    def _grow(self, device: torch.device) -> StageTree:
        modules: dict[str, Callable[[], nn.Module]] = {}
        tensors: dict[str, Callable[[], Tensor]] = {}
        for unit in self.layers:
            assert isinstance(unit, Unit), "a model stage consists of units"
            modules |= {path: partial(unit.get_submodule, name) for path, name in unit.names_of_modules.items()}
            tensors |= {path: partial(getattr, unit, name) for path, name in unit.names_of_tensors.items()}
        return StageTree(self._course.places, modules, tensors, device)

    def _seed_of(self, before: Callable[[int], object] | None) -> Callable[[int], None] | None:
        if before is None:
            return None

        def seed(number: int) -> None:
            before(number - self.first_layer)

        return seed


def cut_units(units: Sequence[Unit], counts: Sequence[int], model: nn.Module, course: Course) -> list[ModelStage]:
    """All units of a model as stages of so many units each."""
    begins = list(pairwise(accumulate(counts, initial=0)))
    stages = [ModelStage(n, len(begins), a, units[a:b], model, course) for n, (a, b) in enumerate(begins)]
    introduce(stages, model)
    return stages


def _by_call(leaves: Sequence[Leaf]) -> dict[int, list[Leaf]]:
    found: dict[int, list[Leaf]] = {}
    for leaf in leaves:
        found.setdefault(leaf.call, []).append(leaf)
    return found
