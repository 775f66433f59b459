"""Tapes: what a prepared forward records, and the I and W that follow from it.

The problem: ``autograd.grad`` for the inputs alone skips the weight gradients, but making them later from the same
graph walks it once per parameter and keeps nearly all of it alive. So the graph is cut where weight gradients begin:

      parameter ──detach──► alias ──┐
                                    ├─► linear ──► y        [1] a recorded operation reads an alias of its parameter:
          input ──────────────► x ──┘     │                     same memory, same bits, but no path to the parameter
                                          └─ hook           [2] autograd hands dy over when it passes here

      I: one ordinary backward pass. It reaches the stage's inputs, every [2], and the parameters through unrecorded
         operations only (norm weights, custom Functions, ...): those gradients are made and added here, by autograd
         itself, whatever the operation is.
      W: plain GEMMs from (x, dy), linear in the number of uses.

Because of [1] nothing can be computed twice, and an operation that is not recorded is not wrong, only not deferred.
Nor can anything be lost unseen: a pass that nobody has announced is refused (``passes``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, MutableSequence, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pipex.backward import compiled as compiled  # so that it is there
from pipex.backward import recording
from pipex.backward.accumulate import accumulate, main_grad_of
from pipex.backward.dtensor import is_dtensor
from pipex.backward.fused import FusedProducts
from pipex.backward.in_order import InOrder, given
from pipex.backward.mixed import GivenUse
from pipex.backward.operations import FUNCTIONS, METHODS
from pipex.backward.passes import (
    Then,
    accumulates,
    announced,
    announced_for,
    keep,
    refuse_graph_of_gradients,
    refuse_unannounced,
)
from pipex.backward.recordable import Recordable
from pipex.backward.root import rooted
from pipex.backward.uses import Sums, Use
from pipex.backward.weights import Cast, Casts, Origins, Target, Weight, is_cached, made
from pipex.torch_internals import (
    add_hooks,
    any_autocast,
    base,
    current_pass,
    engine,
    next_sequence_number,
    version,
)

recording.replace(FUNCTIONS, METHODS)


class Tape:
    """Records one forward, then holds what a backward pass over it leaves to W.

    The graph holds the uses and those the tape, not the other way round, so a forward that nobody goes back through is
    freed with its output.
    """

    __slots__ = (
        "__weakref__", "_casts", "_leaves", "_origins", "_outer", "_passes", "_products", "_recordable",
        "_uses", "_ways", "end_node", "first_node", "layers", "recording", "replays", "then",
    )  # fmt: skip

    def __init__(
        self, recordable: Recordable, then: Then | None, replayed: dict[int, Weight | None] | None = None
    ) -> None:
        self._recordable = recordable
        self.layers = recordable.layers
        self.then = then
        self.replays = replayed is not None
        # By id, the parameters that have been weights; None: only something made of it. A replay has no others.
        self._leaves = {} if replayed is None else replayed
        self._ways: dict[int, object] = {}  # by id of a parameter the first on which its gradient will come
        self._products: list[Any] = []  # nodes of recorded operations, for _origins
        self._origins: Origins | None = None
        self._casts: Casts | None = None
        self.recording = False
        # What has its dy, in the order in which autograd came to it: the use, dy, and the version of dy.
        self._uses: list[tuple[Use, Tensor, int]] = []
        # The same of passes that have not ended, by the engine's graph task: one may run inside of another.
        self._passes: dict[int, MutableSequence[tuple[Use, Tensor, int]]] = {}
        # The sequence numbers of the nodes of the graph that are made while this is open.
        self.first_node = self.end_node = 0
        self._outer: recording.Recorder | None = None

    def __enter__(self) -> Tape:
        self.first_node = next_sequence_number()
        if self._recordable.sees:
            self._outer = recording.start(self)
            self._recordable.own.open()
        self.recording = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._recordable.sees:
            self._recordable.own.close()
            recording.stop(self._outer)
        self._outer, self.recording = None, False
        self._products.clear()
        self._ways.clear()
        self._origins = self._casts = None
        if self.then is None and not self.replays and self._recordable.mixed.watching:
            self.end_node = next_sequence_number()
            self._recordable.mixed.begin(self)

    def replay(self) -> Tape:
        """A tape for a part of this forward that runs again, in I, to save the same tensors; what it leads to is not
        gone back through."""
        return Tape(self._recordable, self.then, self._leaves)

    def weight(self, tensor: Tensor | None, lower: bool = False, of_dtensors: bool = False) -> Weight | None:
        """The operand of an operation as a weight; None where it is none, or its gradient must not be deferred.

        Args:
            lower: whether it is an operation that autocast runs in lower precision.
            of_dtensors: whether all operands are DTensors; else none may be.
        """
        if tensor is None or not tensor.requires_grad:
            return None
        if tensor.grad_fn is None:
            weight = self._leaf(tensor, of_dtensors)
            if weight is None or not any_autocast() or not is_cached(tensor):
                if weight is not None:
                    self._comes_by(tensor, None)
                return weight
            casts = self._casts_now()
            self._comes_by(tensor, casts.region if lower else None)
            return Weight(casts.again(tensor, weight.alias) if lower else weight.alias, Cast(tensor, casts.region))
        if is_dtensor(tensor) is not of_dtensors:
            return None
        if self._origins is None:
            self._origins = Origins()
        self._origins.exclude(self._products)
        self._products.clear()
        parameters = self._origins.parameters(tensor, self._may_be_woven)
        for parameter in parameters:
            self._weave(parameter)
            self._comes_by(parameter, tensor.grad_fn)
        if parameters and self._recordable.mixed.watching:
            self._recordable.mixed.weave(tensor.grad_fn)
        return made(tensor) if parameters else None

    def shared_weight(self, tensor: Tensor) -> Weight | None:
        """The same where what makes its gradient may keep it, or have it in two places."""
        weight = self.weight(tensor)
        self._recordable.accumulators.pop(id(tensor), None)
        return weight

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether it is a buffer, or a frozen parameter, which parametrizations multiply parameters with."""
        return id(tensor) in self._recordable.constants and not tensor.requires_grad

    def _leaf(self, leaf: Tensor, of_dtensors: bool) -> Weight | None:
        key = id(leaf)
        if not self.replays:
            known = self._recordable
            weight = known.weight_of_dtensors(leaf) if of_dtensors else known.weight(leaf)
            if weight is None:
                return None
            self._leaves[key] = weight
        return self._leaves.get(key)

    def _comes_by(self, leaf: Tensor, way: object) -> None:
        """A gradient will come to the parameter as such, by an autocast region, or by what is made of it."""
        if not self.replays and self._ways.setdefault(id(leaf), way) != way:
            self._recordable.several.add(id(leaf))

    def _has(self, leaf: Tensor) -> bool:
        return id(leaf) in self._leaves if self.replays else self._recordable.has(leaf)

    def _may_be_woven(self, leaf: Tensor) -> bool:
        return self._has(leaf) and main_grad_of(leaf) is None

    def _weave(self, leaf: Tensor) -> None:
        if not self.replays:
            self._leaves.setdefault(id(leaf), None)
            self._recordable.weave(leaf)

    def fuses(self, x: Tensor) -> bool:
        """Whether products with this operand may be made under the contract ``fused``."""
        return self._recordable.fuses(x)

    def cast(self, x: Tensor) -> Tensor:
        """An operand of an operation that autocast runs in lower precision, as it does; a weight it casts itself."""
        return self._casts_now().of(x)

    def _casts_now(self) -> Casts:
        region = recording.region()
        if self._casts is None or self._casts.region != region:
            self._casts = Casts(region, self._has)
        return self._casts

    def product(self, use: Use, run: Callable[..., Tensor], *operands: Any) -> Tensor:
        """The output of a recorded operation, with a place in the graph at which the use gets its dy.

        Args:
            run: makes the output, a new tensor or a view of one.
            operands: its arguments, with aliases in the place of weights.
        """
        if any(isinstance(x, Tensor) and x.requires_grad for x in operands):
            y = run(*operands)
            self.hand_over(y, use)
            return y
        return rooted(use, lambda: run(*operands))

    def hand_over(self, y: Tensor, use: Use) -> None:
        """Gives the use the gradient of a fresh product, after all hooks that anybody puts on ``y``.

        In-place operations on a y that is a view of the product (more than two dimensions) replace the view's node,
        which then sees no gradient. So the hook stands on the product.
        """
        product = base(y)
        if product is None:
            node: Any = y.grad_fn
            # Hooks on tensors run before those on nodes, so one that changes the gradient of y is seen.
            node.register_prehook(lambda gradients: use.capture(gradients[0]))
        else:
            node = add_hooks(product, {0: use.capture})  # nobody else has this tensor
        self._products.append(node)

    def captured(self, use: Use, dy: Tensor) -> None:
        """A use has got its dy. Called in a backward pass, whichever it is."""
        task = current_pass()
        if task not in self._passes:
            self._begin_pass(task)
        self._passes[task].append((use, dy, version(dy)))

    def _begin_pass(self, task: int) -> None:
        refuse_graph_of_gradients()
        if self.then is None or accumulates():
            self._passes[task] = []
            # The engine's own place for work at the end of a pass, which DDP and FSDP use too.
            engine.queue_callback(partial(self._end_pass, task))
        else:
            self._passes[task] = deque(maxlen=0)  # nothing of it is wanted

    def _end_pass(self, task: int) -> None:
        self._recordable.pass_ended(task)
        taken = self._passes.pop(task)
        then = self.then or announced_for(task)
        if then is None or self.recording:
            refuse_unannounced()
        self._uses += taken
        then(self)

    def backward_input(
        self, outputs: Sequence[Tensor], output_gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """I: gradients of the stage's inputs. The graph is freed; only (x, dy) of the recorded uses stay.

        Args:
            outputs: the outputs of the prepared forward that require grad, or the loss alone.
            output_gradients: one per output, of its shape; None for a scalar loss.
            inputs: the stage inputs whose gradients are wanted: leaves that require grad, without a ``.grad``.

        Returns:
            one gradient per input, None where no output depends on it.
        """
        if self._recordable.mixed.watching:
            outputs, output_gradients = self._parameters_apart(outputs, output_gradients)
        sharded = self._recordable.sharded
        with _ALONE if sharded is None else sharded.without_reduction(), announced(outputs, keep) as backward:
            torch.autograd.backward(outputs, output_gradients, retain_graph=backward.retains)
        gradients = tuple(x.grad for x in inputs)
        for x in inputs:
            x.grad = None
        return gradients

    def _parameters_apart(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Without outputs that are recorded parameters, whose gradient from outside comes first of all."""
        pairs = []
        for output, gradient in zip(outputs, gradients, strict=True):
            if output.is_leaf and gradient is not None and self._recordable.mixed.takes(output):
                self._uses.append((GivenUse(self, output), gradient, version(gradient)))
            else:
                pairs.append((output, gradient))
        return [output for output, _ in pairs], [gradient for _, gradient in pairs]

    @property
    def held(self) -> list[Tensor]:
        """What W keeps alive: the input and the gradient of the output of every use."""
        return [tensor for use, dy, _ in self._uses for tensor in (*use.held, dy)]

    @property
    def targets(self) -> list[Target] | None:
        """What W gives gradients to, as often as it adds to each; None where that is not known before."""
        found: list[Target] = []
        for use, _, _ in self._uses:
            if use.targets is None:
                return None
            found += use.targets
        return given(found, self._recordable.several) if self._recordable.several else found

    def backward_weight(self, more: bool = False) -> None:
        """W: adds the deferred weight gradients to ``.grad``, or to ``.main_grad`` where a parameter has one.

        The uses of one parameter are summed first, latest use first, as autograd's engine does, and then added once;
        or, under the contract ``fused``, products are added as they are made.

        Args:
            more: whether the stage's next W follows at once. Then products of both may be made together, and what this
                one's should be is in the gradients only after that.
        """
        sharded = self._recordable.sharded
        if sharded is None:
            self._make_weight_gradients(more)
        else:  # which sums micro-batch by micro-batch
            with sharded.for_weight(self.held, self.targets):
                self._make_weight_gradients(False)

    def _make_weight_gradients(self, more: bool) -> None:
        sums, fused = Sums(), self._recordable.fused
        try:
            self.add_to(sums, fused)
            accumulate(*sums.cast_back(), self._recordable.accumulators)
        except BaseException:
            fused.clear()  # or the next step's W would add it
            for key in self._recordable.woven:
                self._recordable.forget(key)  # as ``naming_graphs_that_are_gone`` has promised
            raise
        if not more:
            fused.add()

    def add_to(self, sums: Sums, fused: FusedProducts | None = None) -> None:
        """The products of W, once: the uses are let go. Those that ``fused`` takes are left to it."""
        several = self._recordable.several
        uses, self._uses = self._uses, []
        if several:
            sums = in_order = InOrder(sums, [target for use, _, _ in uses for target in use.targets or ()], several)
        if self._recordable.mixed.watching:
            self._recordable.mixed.end(self)
        for use, dy, its_version in uses:  # neither x nor dy requires grad, so nothing here makes a graph
            if version(dy) != its_version:
                raise RuntimeError(
                    f"the gradient of an operation's output was modified in place before its weight gradient was made; "
                    f"got version {version(dy)} of a tensor of shape {tuple(dy.shape)}, needed version {its_version}; "
                    f"use an out-of-place operation there"
                )
            taken = fused is not None and self._recordable.fuses(dy) and fused.take(use, dy)
            if not taken:
                use.add_to(sums, dy)
        if several:
            in_order.finish()


_ALONE = nullcontext()
