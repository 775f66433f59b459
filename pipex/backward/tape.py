"""Tapes: what a prepared forward records, and the I and W that follow from it.

The problem: ``autograd.grad`` for the inputs alone skips the weight gradients, but making them later from the same
graph walks it once per parameter and keeps nearly all of it alive. So the graph is cut where weight gradients begin:

      parameter ──detach──► alias ──┐
                                    ├─► linear ──► y        [1] a recorded operation reads an alias of its parameter:
          input ──────────────► x ──┘     │                     same memory, same bits, but no path to the parameter
                                          └─ hook           [2] autograd hands dy over when it passes here

      I: one ordinary backward pass. It reaches the stage's inputs, every [2], and the parameters through unrecorded
         operations only (norm weights, custom Functions, convolutions, ...): those gradients are made and added here,
         by autograd itself, whatever the operation is.
      W: plain GEMMs from (x, dy), linear in the number of uses.

Because of [1] nothing can be computed twice, and an operation that is not recorded is not wrong, only not deferred.
Nor can anything be lost unseen: a pass that nobody has announced is refused (``passes``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import has_torch_function_unary
from torch.utils.hooks import RemovableHandle

from pipex.backward import recording
from pipex.backward.accumulate import Accumulator, accumulate
from pipex.backward.activated import activated_linear, activation_of, worthwhile
from pipex.backward.fused import FusedProducts
from pipex.backward.mixed import GivenUse, Mixed
from pipex.backward.passes import (
    Deferred,
    Then,
    accumulates,
    announced,
    announced_for,
    refuse_graph_of_gradients,
    refuse_unannounced,
    watchers,
)
from pipex.backward.root import rooted
from pipex.backward.uses import EmbeddingUse, LinearUse, Sums, Use
from pipex.torch_internals import (
    add_hooks,
    base,
    current_pass,
    engine,
    hooks_of,
    is_compiled,
    next_sequence_number,
    require_split_backward,
    version,
)


class Splitter:
    """Makes tapes for one stage.

    Args:
        parameters: the stage's parameters; frozen ones are skipped while they are, repeated ones (tied) count once.
        exact: whether W has autograd's bits, or may be made by fewer and faster products (``fused``); None: on the CPU
            only, where these are no faster.

    Raises:
        UnsupportedModule: this torch lacks what it needs.
    """

    def __init__(self, parameters: Iterable[Tensor], exact: bool | None = None) -> None:
        require_split_backward()
        self._recordable = {id(p): p for p in parameters}
        self._aliases: dict[int, Tensor] = {}  # by id of the parameter
        self.accumulators: dict[int, Accumulator] = {}  # of recorded parameters, by their id
        self.fused = FusedProducts(self.accumulators)
        self._exact = exact
        self.mixed = Mixed(self.accumulators)
        # For passes that nobody announces, until the first has ended: the watch, and by id the pass that came there.
        self._unproven: list[RemovableHandle] = []
        self._reached: dict[int, int] = {}

    @staticmethod
    def of(module: nn.Module, exact: bool | None = None) -> Splitter:
        """For all parameters of the module; none where they must not be deferred: where DDP waits for them, and where
        compiled parts have a backward of their own."""
        for part in module.modules():
            if is_compiled(part) or isinstance(part, DistributedDataParallel):
                return Splitter(())
        return Splitter(module.parameters(), exact)

    def close(self) -> None:
        """Lets go of the parameters; another one takes over."""
        for handle in self._unproven:
            handle.remove()
        self._unproven.clear()
        self._stop_watching()

    def fuses(self, dy: Tensor) -> bool:
        """Whether the contract ``fused`` holds for an operation with this gradient."""
        return dy.is_cuda if self._exact is None else not self._exact

    def record(self, then: Then | None = None, keeper: recording.Keeper | None = None) -> Tape:
        """A new tape; the forward runs inside ``with``.

        Args:
            then: gets the tape at the end of every pass over it, so that none has to be announced.
            keeper: whose hooks see what autograd saves, and who is told of what the tape keeps.
        """
        if self.mixed.watching and self.mixed.settled:
            for key in self.mixed.found:
                self._forget(key)
            self._stop_watching()
        return Tape(self, then, keeper)

    def alias(self, parameter: Tensor | None, bias_of: Tensor | None = None) -> Tensor | None:
        """The stand-in of a matrix, or of the bias beside one, in recorded operations; None where its gradient must not
        be deferred."""
        if parameter is None or not parameter.requires_grad or hooks_of(parameter):
            return None  # the last ones must see the whole gradient
        known = self._aliases.get(id(parameter))
        if known is not None and parameter.is_set_to(known):  # the same memory, shape and strides
            return known
        fits = parameter.dim() == 2 if bias_of is None else parameter.shape == bias_of.shape[:1]
        if id(parameter) not in self._recordable or not fits or _has_rules(parameter):
            return None  # not ours, or not recorded everywhere
        # Where its memory alone is another, its accumulator is the same, and so are its uses. A plan with older weights
        # gives it other memory from one micro-batch to the next: watched anew at each, it would be watched for ever.
        if known is None or (known.dtype, known.device) != (parameter.dtype, parameter.device):
            self._watch(parameter)
        self._aliases[id(parameter)] = alias = parameter.detach()
        return alias

    def _watch(self, parameter: Tensor) -> None:
        """Sees which passes come to a recorded parameter nevertheless."""

        def reached(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                self._reached[id(parameter)] = current_pass()

        self.accumulators[id(parameter)] = accumulator = Accumulator(parameter)
        self._unproven.append(accumulator.node.register_prehook(reached))
        self.mixed.watch(accumulator.node, parameter)
        watchers.add(self.mixed)

    def _stop_watching(self) -> None:
        watchers.discard(self.mixed)
        self.mixed.clear()

    def _forget(self, key: int) -> None:
        """The parameter is not recorded again."""
        self._recordable.pop(key, None)
        self._aliases.pop(key, None)
        self.accumulators.pop(key, None)

    def pass_ended(self, graph_task: int) -> None:
        """A recorded parameter that this pass over a tape has come to is used in unrecorded operations too: it is not
        recorded again, so that all its gradients are summed by autograd, in autograd's order. What the first such pass
        shows holds for the others."""
        if self._unproven:
            for key, task in self._reached.items():
                if task == graph_task:
                    self._forget(key)
            for handle in self._unproven:
                handle.remove()
            self._unproven.clear()
            self._reached.clear()


class Tape:
    """Records one forward, then holds what a backward pass over it leaves to W.

    The graph holds the uses and those the tape, not the other way round, so a forward that nobody goes back through is
    freed with its output.
    """

    __slots__ = (
        "__weakref__", "_outer", "_passes", "_splitter", "_uses", "end_node", "first_node", "keeper", "recording",
        "then",
    )  # fmt: skip

    def __init__(self, splitter: Splitter, then: Then | None, keeper: recording.Keeper | None) -> None:
        self._splitter = splitter
        self.then, self.keeper = then, keeper
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
        self._outer = recording.start(self)
        self.recording = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        recording.stop(self._outer)
        self._outer, self.recording = None, False
        if self.then is None and self._splitter.mixed.watching:
            self.end_node = next_sequence_number()
            self._splitter.mixed.begin(self)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear of a contiguous x, recorded where the gradient of ``weight`` or ``bias`` can be deferred."""
        w, b = self._splitter.alias(weight), self._splitter.alias(bias, weight)
        if w is None and b is None:
            return recording.torch_linear(x, weight, bias)
        # Without the weight's gradient nothing of x is kept, nor need it stay unchanged.
        kept = x.new_empty(0) if w is None else x
        use = LinearUse(self, kept, None if w is None else weight, None if b is None else bias)
        if self.keeper is not None:
            self.keeper.use(use)
        if w is not None and (b is None) == (bias is None) and self._splitter.fuses(x):
            activation = activation_of(x, self.first_node)
            if activation is not None and worthwhile(activation, x, w):
                return activated_linear(use, activation, w, b)
        w, b = weight if w is None else w, bias if b is None else b
        if x.requires_grad or w.requires_grad or (b is not None and b.requires_grad):
            y = recording.torch_linear(x, w, b)
            _hand_over(y, use.capture)
        else:
            y = rooted(use, lambda: recording.torch_linear(x, w, b))
        return y

    def embedding(self, x: Tensor, weight: Tensor, padding: int | None, scale_by_frequency: bool) -> Tensor:
        """F.embedding, recorded where the gradient of ``weight`` can be deferred."""
        w = self._splitter.alias(weight)
        if w is None:
            return recording.torch_embedding(x, weight, padding, scale_grad_by_freq=scale_by_frequency)
        row = -1 if padding is None else padding % weight.shape[0]
        use = EmbeddingUse(self, x, weight, row, scale_by_frequency)
        if self.keeper is not None:
            self.keeper.use(use)
        return rooted(use, lambda: recording.torch_embedding(x, w, padding))

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
        self._splitter.pass_ended(task)
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
        if self._splitter.mixed.watching:
            outputs, output_gradients = self._parameters_apart(outputs, output_gradients)
        with announced(outputs, keep):
            torch.autograd.backward(outputs, output_gradients)
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
            if output.is_leaf and gradient is not None and self._splitter.mixed.takes(output):
                self._uses.append((GivenUse(self, output), gradient, version(gradient)))
            else:
                pairs.append((output, gradient))
        return [output for output, _ in pairs], [gradient for _, gradient in pairs]

    @property
    def held(self) -> list[Tensor]:
        """What W keeps alive: the input and the gradient of the output of every use."""
        return [tensor for use, dy, _ in self._uses for tensor in (use.x, dy)]

    def backward_weight(self, more: bool = False) -> None:
        """W: adds the deferred weight gradients to ``.grad``, or to ``.main_grad`` where a parameter has one.

        The uses of one parameter are summed first, latest use first, as autograd's engine does, and then added once;
        or, under the contract ``fused``, products are added as they are made.

        Args:
            more: whether the stage's next W follows at once. Then products of both may be made together, and what this
                one's should be is in the gradients only after that.
        """
        sums, fused = Sums(), self._splitter.fused
        try:
            self.add_to(sums, fused)
            accumulate(sums.parameters, sums.gradients, self._splitter.accumulators)
        except BaseException:
            fused.clear()  # or the next step's W would add it
            raise
        if not more:
            fused.add()

    def add_to(self, sums: Sums, fused: FusedProducts | None = None) -> None:
        """The products of W, once: the uses are let go. Those that ``fused`` takes are left to it."""
        uses, self._uses = self._uses, []
        if self._splitter.mixed.watching:
            self._splitter.mixed.end(self)
        for use, dy, its_version in uses:  # neither x nor dy requires grad, so nothing here makes a graph
            if version(dy) != its_version:
                raise RuntimeError(
                    f"the gradient of an operation's output was modified in place before its weight gradient was made; "
                    f"got version {version(dy)} of a tensor of shape {tuple(dy.shape)}, needed version {its_version}; "
                    f"use an out-of-place operation there"
                )
            taken = fused is not None and self._splitter.fuses(dy) and fused.take(use, dy)
            if not taken:
                use.add_to(sums, dy)


def _has_rules(parameter: Tensor) -> bool:
    """Whether it is of a subclass that gives operations a meaning, and so gradients, of its own."""
    return has_torch_function_unary(parameter) or type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _hand_over(y: Tensor, capture: Callable[[Tensor], None]) -> None:
    """Calls ``capture`` with the gradient of a fresh product, after all hooks that anybody puts on ``y``.

    In-place operations on y put their nodes behind the product's own; but where y is a view of the product (more than
    two dimensions), they replace the view's node, which then sees no gradient. So the hook stands on the product.
    """
    product = base(y)
    if product is None:
        # Hooks on tensors run before those on nodes, so one that changes the gradient of y is seen.
        y.grad_fn.register_prehook(lambda gradients: capture(gradients[0]))  # type: ignore[union-attr]
    else:
        add_hooks(product, {0: capture})  # nobody else has this tensor


def keep(_: Deferred) -> None:
    """For ``announced``: W comes later; whoever called the pass has the tape."""
