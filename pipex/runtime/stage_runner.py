"""One stage on its rank: forward, and the backward whole or split, for the micro-batches under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipex.backward import Splitter, Tape
from pipex.errors import UnsupportedModule
from pipex.partition.stage import NOTHING, Stage
from pipex.plan import Placement
from pipex.runtime import seeding
from pipex.runtime.loss import Loss, MicroLoss
from pipex.torch_internals import storage_id


def output_tensors(stage: Stage, output: Any) -> tuple[Tensor, ...]:
    """What a stage hands to the next one.

    Raises:
        UnsupportedModule: it is neither a tensor nor a tuple of tensors, is an empty one, or one of them is sparse.
    """
    tensors = output if isinstance(output, tuple) else (output,)
    if not tensors:
        raise UnsupportedModule(f"stage {stage.index} hands nothing to the next stage", got="an empty tuple",
                                needed="a dense tensor or a tuple of them")  # fmt: skip
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise UnsupportedModule(
                f"stage {stage.index} cannot hand its output to the next stage",
                got=f"a {tensor.layout} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__,
                needed="a dense tensor or a tuple of them",
                fix="return tensors from the last layer of the stage",
            )  # fmt: skip
    return tensors


def _memory(tensor: Tensor) -> int:
    """The same for all views of the same memory; 0 for a sparse tensor, which has no storage of its own."""
    # Not the address: a tensor subclass that wraps others has a storage without one.
    return storage_id(tensor.untyped_storage()) if tensor.layout is torch.strided else 0


def differentiable(tensor: Tensor) -> bool:
    """Whether a gradient of it travels back; says for a tensor what ``TensorForm.differentiable`` says for its form."""
    return tensor.is_floating_point() or tensor.is_complex()


@dataclass(slots=True)
class _Live:
    """What a micro-batch keeps from its forward until its last backward."""

    inputs: tuple[Tensor, ...]
    roots: Sequence[Tensor]  # outputs that require grad, or the loss: where the backward starts
    gradient_of: tuple[bool, ...]  # which differentiable outputs have a root
    tape: Tape | None  # None where the backward is not split


class StageRunner:
    """Runs one stage.

    Args:
        stage: the stage; the runner owns it while the pipeline lives.
        placement: of the whole pipeline's stages.
        loss: used on the last stage only.
        device: where the stage lives.
        seed: seed of all random layers.
        exact: as of ``Splitter``.
    """

    def __init__(
        self,
        stage: Stage,
        placement: Placement,
        loss: Loss,
        device: torch.device,
        seed: int,
        exact: bool | None,
    ) -> None:
        self.stage = stage
        self.index = stage.index
        self.first = placement.before(stage.index) is None
        self.last = placement.after(stage.index) is None
        self.random_layers: frozenset[int] = frozenset()  # positions in stage.layers; filled in by the announcement
        self.live: dict[int, _Live] = {}
        self.losses: dict[int, MicroLoss] = {}  # per micro-batch, on the last stage
        self.microbatches_before = 0  # those of earlier calls that add to the same gradients; for seeds
        self._loss = loss
        self._device = device
        self._seed = seed
        self._splitter = Splitter.of(stage, exact)
        self._buffers = {_memory(buffer) for buffer in stage.buffers()} - {0}

    def compute(self, step: int, microbatch: int, inputs: tuple[Any, ...]) -> Any:
        """The stage's output, with its random layers seeded while it trains."""
        if not self.random_layers or not self.stage.training:
            return self.stage(*inputs)
        number = self.microbatches_before + microbatch
        seeds = seeding.of_layers(self._device, self._seed, step, number, self.stage.first_layer)
        return self.stage.run(inputs, lambda position: seeds(position) if position in self.random_layers else NOTHING)

    def forward(
        self, step: int, microbatch: int, inputs: tuple[Any, ...], target: Any, weight: float, split: bool
    ) -> tuple[Tensor, ...]:
        """F. Returns what the next stage gets; nothing on the last stage, which keeps its loss instead.

        Args:
            inputs: received tensors; on stage 0 the micro-batch, which may hold anything.
            target: the micro-batch's target; read on the last stage only.
            weight: the micro-batch's share of the batch's samples; a mean loss is scaled by it before backward.
            split: whether W is deferred (``pipex.backward.deferral``): ``backward_input`` and ``backward_weight`` will
                follow, rather than ``backward``.
        """
        received = () if self.first else inputs  # nobody waits for gradients of the batch
        for tensor in received:
            if differentiable(tensor):
                tensor.requires_grad_()
        if split:
            with self._splitter.record() as tape:
                output = self.compute(step, microbatch, inputs)
        else:
            tape = None
            output = self.compute(step, microbatch, inputs)
        if self.last:
            root = self.loss(microbatch, output, target, weight)
            roots: Sequence[Tensor] = (root,) if root.requires_grad else ()
            self.live[microbatch] = _Live(received, roots, (), tape)
            return ()
        outputs = self.message(output)
        mask = tuple(t.requires_grad for t in outputs if differentiable(t))
        self.live[microbatch] = _Live(received, [t for t in outputs if t.requires_grad], mask, tape)
        return outputs

    def message(self, output: Any) -> tuple[Tensor, ...]:
        """What goes to the next stage of the stage's output. A buffer of the stage goes as a copy: a message is read
        later, and the next micro-batch may have written to the buffer by then.

        Raises:
            UnsupportedModule: as ``output_tensors``.
        """
        tensors = output_tensors(self.stage, output)
        return tuple(t.clone() if _memory(t) in self._buffers else t for t in tensors) if self._buffers else tensors

    def loss(self, microbatch: int, output: Any, target: Any, weight: float) -> Tensor:
        """Keeps the loss of a micro-batch; returns where its backward starts.

        Raises:
            InputError: as ``Loss``.
        """
        root, self.losses[microbatch] = self._loss(output, target, weight)
        return root

    def backward_input(self, microbatch: int, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """I. Takes the gradients of the differentiable outputs, returns those of the differentiable inputs."""
        live = self.live[microbatch]
        assert live.tape is not None, "the plan said B for this micro-batch"
        inputs = [t for t in live.inputs if t.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if live.roots:
            found = live.tape.backward_input(live.roots, self._seeds_of(live, gradients), inputs)
        live.roots, live.inputs = (), ()
        return _dense(found, inputs)

    def backward_weight(self, microbatch: int, more: bool) -> None:
        """W. ``more`` says that the rank's next action is the stage's next W (``Tape.backward_weight``)."""
        tape = self.live.pop(microbatch).tape
        assert tape is not None, "the plan said B for this micro-batch"
        tape.backward_weight(more)

    def backward(self, microbatch: int, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """B, or I with its W: the whole backward in one pass of autograd's engine."""
        live = self.live.pop(microbatch)
        inputs = [t for t in live.inputs if t.requires_grad]
        if live.roots:
            torch.autograd.backward(live.roots, self._seeds_of(live, gradients))
        return _dense([t.grad for t in inputs], inputs)

    def reset(self) -> None:
        """Forgets the micro-batches under way and the losses."""
        self.live.clear()
        self.losses.clear()
        self._splitter.fused.clear()

    def _seeds_of(self, live: _Live, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        if self.last:
            return [None]
        return [g for g, has_root in zip(gradients, live.gradient_of, strict=True) if has_root]


def _dense(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients to send: an input that no output depends on gets zeros, since every announced message must go."""
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True))
