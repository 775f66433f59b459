"""One stage on its rank: forward, and the backward whole or split, for the micro-batches under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from pipex.backward import Splitter, Tape
from pipex.backward.waiting import Waiting
from pipex.errors import MessageMismatch, UnsupportedModule
from pipex.partition import Stage
from pipex.plan import Placement
from pipex.runtime.aliases import fold
from pipex.runtime.loss import Loss, MicroLoss, Share
from pipex.runtime.received import Received, seeded
from pipex.runtime.seeding import Seeds
from pipex.runtime.shared_state import Watch
from pipex.runtime.survey import survey
from pipex.runtime.tied import Accumulators
from pipex.transport.interface import form_of


def output_tensors(stage: Stage, output: Any) -> tuple[Tensor, ...]:
    """What a stage hands to the next one.

    Raises:
        UnsupportedModule: it is neither a tensor nor a tuple of tensors, or one of them is sparse or nested.
    """
    tensors = output if isinstance(output, tuple) else (output,)
    for tensor in tensors or [()]:
        if isinstance(tensor, Tensor):
            if tensor.layout is torch.strided and not tensor.is_nested:
                continue
            got = "a nested tensor" if tensor.is_nested else f"a {tensor.layout} tensor"
        else:
            got = type(tensor).__name__
        raise UnsupportedModule(
            f"stage {stage.index} cannot hand its output to the next stage",
            got=got, needed="a dense tensor or a tuple of them", fix="return tensors from the last layer of the stage",
        )  # fmt: skip
    return tensors


@dataclass(slots=True)
class _Live:
    """What a micro-batch keeps from its forward until its last backward."""

    received: Received
    roots: Sequence[Tensor]  # outputs that require grad, or the loss: where the backward starts
    tape: Tape | None  # None where the backward is not split


class StageRunner:
    """Runs one stage.

    Args:
        index: of the stage, in the plan.
        stage: the piece of the model that it is; the runner owns it while the pipeline lives.
        placement: of the whole pipeline's stages.
        loss: used on the last stage only.
        seeds: of the random layers, and of the loss.
        exact: as of ``Splitter``.
        accumulators: of the parameters that other stages of this process hold too.
        watch: over what other stages keep too.
    """

    def __init__(
        self,
        index: int,
        stage: Stage,
        placement: Placement,
        loss: Loss,
        seeds: Seeds,
        exact: bool | None,
        accumulators: Accumulators,
        watch: Watch | None,
    ) -> None:
        self.stage = stage
        self.index = index
        self.first = placement.before(index) is None
        self.last = placement.after(index) is None
        self.live: dict[int, _Live] = {}
        self.losses: dict[int, MicroLoss] = {}  # per micro-batch, on the last stage
        self.microbatches_before = 0  # those of earlier calls that add to the same gradients; for seeds
        self._loss = loss
        # None of torch's functions that are losses does.
        self._loss_draws = self.last and getattr(loss.function, "__module__", None) != "torch.nn.functional"
        self._seeds = seeds
        self._seed: Callable[[int], None] = lambda layer: None  # of the micro-batch at hand
        self._exact = exact
        self._accumulators = accumulators
        self._watch = watch
        self._splitter = Splitter.of(stage, exact)
        self.waiting = Waiting(stage, index)
        self.survey = survey(stage)

    def look(self) -> None:
        """Sees what the stage consists of now; called at the beginning of a step or evaluation."""
        before, self.survey = self.survey.parameters, survey(self.stage)
        now = self.survey.parameters
        if len(before) != len(now) or not all(map(is_, before, now)):
            self._splitter.close()
            self._splitter = Splitter.of(self.stage, self._exact)
        self._call_before_layers(self._before_layer if self._draws else None)
        if self.last:
            self.stage.own_loss = self._loss.is_models  # which another pipeline of the stage may have otherwise

    def compute(self, step: int, microbatch: int, inputs: tuple[Any, ...]) -> Any:
        """The stage's output. Layers that may draw random numbers are seeded, and the loss that follows them."""
        if self._draws or self._loss_draws:
            self._seed = self._seeds.of(step, self.microbatches_before + microbatch)
        with _UNWATCHED if self._watch is None else self._watch.forward():
            output = self.stage(*inputs)
        if self._loss_draws:
            self._seed(self.stage.behind)
        return output

    @property
    def _draws(self) -> bool:
        """Whether anything in the stage may draw random numbers."""
        return bool(self.survey.drawing) or self.stage.draws_between

    def _before_layer(self, position: int) -> None:
        if position in self.survey.drawing or self.stage.draws_between:
            self._seed(self.stage.first_layer + position)

    def forward(
        self, step: int, microbatch: int, inputs: tuple[Any, ...], target: Any, share: Share, split: bool
    ) -> tuple[Tensor, ...]:
        """F. Returns what the next stage gets; nothing on the last stage, which keeps its loss instead.

        Args:
            inputs: received tensors; on stage 0 the micro-batch, which may hold anything.
            target: the micro-batch's target; read on the last stage only.
            share: of the micro-batch; a mean loss is scaled by it before backward.
            split: whether W is deferred (``pipex.backward.deferral``): ``backward_input`` and ``backward_weight`` will
                follow, rather than ``backward``.
        """
        received = self.received(inputs)
        if not self.first:
            inputs = received.handed
        if split:
            with self._splitter.record() as tape:
                output = self.compute(step, microbatch, inputs)
        else:
            tape = None
            with self._splitter.whole():
                output = self.compute(step, microbatch, inputs)
        if self.last:
            root = self.loss(microbatch, output, target, share)
            received.check_use(self.index)
            roots: Sequence[Tensor] = (root,) if root.requires_grad else ()
            self.live[microbatch] = _Live(received, roots, tape)
            return ()
        received.check_use(self.index)
        outputs = self.message(output, received)
        self.live[microbatch] = _Live(received, [t for t in outputs if t.requires_grad], tape)
        return outputs

    def evaluate(
        self, step: int, microbatch: int, inputs: tuple[Any, ...], target: Any, share: Share
    ) -> tuple[Tensor, ...]:
        """The forward alone; arguments and result as of ``forward``."""
        received = self.received(inputs)
        output = self.compute(step, microbatch, inputs if self.first else received.handed)
        if self.last:
            self.loss(microbatch, output, target, share)
        received.check_use(self.index)
        return () if self.last else self.message(output, received)

    def received(self, inputs: tuple[Any, ...]) -> Received:
        """What came from the stage before, if there is one."""
        return _NOTHING if self.first else Received(inputs, self.survey.plain)

    def message(self, output: Any, received: Received) -> tuple[Tensor, ...]:
        """What goes to the next stage of the stage's output.

        Raises:
            UnsupportedModule: as ``output_tensors``.
        """
        tensors = output_tensors(self.stage, output)
        return tensors if len(tensors) == 1 else tuple(fold(tensors, received.overlapping))

    def loss(self, microbatch: int, output: Any, target: Any, share: Share) -> Tensor:
        """Keeps the loss of a micro-batch; returns where its backward starts.

        Raises:
            InputError: as ``Loss``.
        """
        root, self.losses[microbatch] = self._loss(output, target, share)
        return root

    def before_backward(self, microbatch: int) -> None:
        """Called before the first backward of a micro-batch, under the autocast of its forward: for what the stage has
        to make anew, which is nothing where it has kept all."""

    def backward_input(self, microbatch: int, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """I. Takes the gradients of the outputs that require grad, returns those of the inputs that do.

        Raises:
            MessageMismatch: the gradients are not those of the outputs.
        """
        live = self.live[microbatch]
        assert live.tape is not None, "the plan said B for this micro-batch"
        roots, seeds = self._seeded(live, gradients)
        if roots:
            with self._accumulators.during(self.index), self.waiting.look():
                live.tape.backward_input(roots, seeds, ())
        found = live.received.gradients()
        live.roots, live.received = (), _NOTHING
        return found

    def backward_weight(self, microbatch: int, more: bool) -> None:
        """W. ``more`` says that the rank's next action is the stage's next W (``Tape.backward_weight``)."""
        tape = self.live.pop(microbatch).tape
        assert tape is not None, "the plan said B for this micro-batch"
        with self._accumulators.during(self.index):
            tape.backward_weight(more)

    def backward(self, microbatch: int, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """B, or I with its W: the whole backward in one pass of autograd's engine."""
        live = self.live.pop(microbatch)
        roots, seeds = self._seeded(live, gradients)
        if roots:
            with self._accumulators.during(self.index):
                torch.autograd.backward(roots, seeds)
        return live.received.gradients()

    def reset(self) -> None:
        """Forgets the micro-batches under way and the losses."""
        self.live.clear()
        self.losses.clear()
        self._splitter.fused.clear()
        self._call_before_layers(None)

    def _call_before_layers(self, function: Callable[[int], None] | None) -> None:
        if self.stage.before_layer is not function:  # a module's attributes are slow to set
            self.stage.before_layer = function

    def _seeded(self, live: _Live, gradients: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Where the backward starts, and the gradients of that."""
        if self.last:
            return live.roots, [None] * len(live.roots)
        found = seeded(live.roots, gradients)
        if found is None:
            raise MessageMismatch(
                f"stage {self.index} received other gradients than its outputs need",
                got=_words(gradients), needed=_words(live.roots),
                fix="use one version of pipex, and the same model, on all ranks",
            )  # fmt: skip
        return found


def _words(tensors: Sequence[Tensor]) -> str:
    return f"{len(tensors)} tensors: {', '.join(map(str, form_of(tensors)))}" if tensors else "no tensors"


_UNWATCHED: AbstractContextManager[None] = nullcontext()

_NOTHING = Received((), plain=True)
