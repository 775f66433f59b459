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
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from pipex.backward import recording
from pipex.backward.accumulate import accumulate
from pipex.backward.root import rooted
from pipex.backward.uses import EmbeddingUse, LinearUse, Sums, Use


class Splitter:
    """Makes tapes for one stage.

    Args:
        parameters: the stage's parameters; frozen ones are skipped, repeated ones (tied) are counted once.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._recordable = {id(p): p for p in parameters if p.requires_grad}
        self._aliases: dict[int, tuple[int, Tensor]] = {}  # id of a parameter -> its address, its alias
        self._unproven: dict[int, Tensor] = {}  # recorded parameters that no I has shown to be recorded everywhere

    def record(self) -> Tape:
        """A new tape; the forward runs inside ``with``."""
        return Tape(self)

    def alias(self, parameter: Tensor | None) -> Tensor | None:
        """The stand-in of a parameter in recorded operations; None where its gradient must not be deferred."""
        if parameter is None or id(parameter) not in self._recordable or parameter._backward_hooks:
            return None  # not ours, frozen, not recorded everywhere, or with hooks that must see the whole gradient
        known = self._aliases.get(id(parameter))
        address = parameter.data_ptr()
        if known is not None and known[0] == address:
            return known[1]
        alias = parameter.detach()
        self._aliases[id(parameter)] = address, alias
        self._unproven[id(parameter)] = parameter
        return alias

    def backward(self, outputs: Sequence[Tensor], output_gradients: Sequence[Tensor | None]) -> None:
        """Autograd's pass. A recorded parameter that it reaches nevertheless is used in unrecorded operations too: it
        is not recorded again, so that all its gradients are summed by autograd, in autograd's order."""
        before = {key: (p.grad, None if p.grad is None else p.grad._version) for key, p in self._unproven.items()}
        torch.autograd.backward(outputs, output_gradients)
        for key, (gradient, version) in before.items():
            now = self._unproven.pop(key).grad
            if now is not gradient or (now is not None and now._version != version):
                del self._recordable[key]


class Tape:
    """The recorded uses of one forward. Used once, in the order forward, I, W."""

    __slots__ = ("_outer", "_splitter", "_uses")

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter
        self._uses: list[Use] = []
        self._outer: Tape | None = None

    def __enter__(self) -> Tape:
        self._outer = recording.start(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        recording.stop(self._outer)
        self._outer = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear of a contiguous x, recorded where the gradient of ``weight`` or ``bias`` can be deferred."""
        w, b = self._splitter.alias(weight), self._splitter.alias(bias)
        if w is None and b is None:
            return recording.torch_linear(x, weight, bias)
        use = LinearUse(x, None if w is None else weight, None if b is None else bias)
        w, b = weight if w is None else w, bias if b is None else b
        if x.requires_grad or w.requires_grad or (b is not None and b.requires_grad):
            y = recording.torch_linear(x, w, b)
            # In-place operations on y put their nodes behind the product's own; but where y is a view of the product
            # (more than two dimensions), they replace the view's node, which then sees no gradient.
            product = y if y._base is None else y._base
            product.grad_fn.register_prehook(use.capture)  # type: ignore[union-attr]
        else:
            y = rooted(use, lambda: recording.torch_linear(x, w, b))
        self._uses.append(use)
        return y

    def embedding(self, x: Tensor, weight: Tensor, padding: int | None, scale_by_frequency: bool) -> Tensor:
        """F.embedding, recorded where the gradient of ``weight`` can be deferred."""
        w = self._splitter.alias(weight)
        if w is None:
            return recording.torch_embedding(x, weight, padding, scale_grad_by_freq=scale_by_frequency)
        row = -1 if padding is None else padding % weight.shape[0]
        use = EmbeddingUse(x, weight, row, scale_by_frequency)
        self._uses.append(use)
        return rooted(use, lambda: recording.torch_embedding(x, w, padding))

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
        self._splitter.backward(outputs, output_gradients)
        for use in self._uses:
            use.x = use.x.detach()  # lets the graph go now, as an unsplit backward would
        gradients = tuple(x.grad for x in inputs)
        for x in inputs:
            x.grad = None
        return gradients

    def backward_weight(self) -> None:
        """W: adds the deferred weight gradients to ``.grad``.

        The uses of one parameter are summed first, latest use first, as autograd's engine does, and then added once.
        """
        sums = Sums()
        for use in reversed(self._uses):  # neither x nor dy requires grad, so nothing here makes a graph
            if use.dy is not None:
                use.add_to(sums)
        accumulate(sums.parameters, sums.gradients)
        self._uses = []
