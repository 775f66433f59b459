"""Tapes: what a prepared forward records, and the I and W that follow from it.

The problem: ``autograd.grad`` for the inputs alone skips the weight gradients, but making them later from the same
graph walks it once per parameter and keeps nearly all of it alive. So the graph is cut where weight gradients begin:

      parameter ──detach──► alias ──┐
                                    ├─► linear ──► y        [1] a recorded operation reads an alias of its parameter:
          input ──────────────► x ──┘     │                     same memory, same bits, but no path to the parameter
                                          └─ edge of y      [2] its output's place in the graph is remembered

      I: one engine pass from the outputs to the stage's inputs, to every [2] (which gives dy), and to the
         parameters themselves, which are now reached through unrecorded operations only (norm weights, custom
         Functions, convolutions, ...): those gradients are made here, once, whatever the operation is.
      W: plain GEMMs from (x, dy), under no_grad, linear in the number of uses.

Because of [1] nothing can be computed twice, and an operation that is not recorded is not wrong, only not deferred.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipex.backward import recording
from pipex.backward.accumulate import accumulate, owned
from pipex.backward.uses import EmbeddingUse, LinearUse, Sums, Use


class _Aliases(NamedTuple):
    """Two tensors over a parameter's memory.

    ``plain`` is cut off from autograd: the smallest graph, where the input alone carries it. ``leaf`` requires grad as
    the parameter does: where the input does not, and where torch would choose another kernel without it.
    """

    address: int
    plain: Tensor
    leaf: Tensor


class Splitter:
    """Makes tapes for one stage.

    Args:
        parameters: the stage's parameters; frozen ones are skipped, repeated ones (tied) are counted once.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = tuple({id(p): p for p in parameters if p.requires_grad}.values())
        self._known = {id(p) for p in self.parameters}
        self.known_aliases: dict[int, _Aliases] = {}  # by id of a parameter that has stood in a recorded operation

    def record(self) -> Tape:
        """A new tape; the forward runs inside ``with``."""
        return Tape(self)

    def aliases(self, parameter: Tensor | None) -> _Aliases | None:
        """The stand-ins of a parameter in recorded operations; None where its gradient must not be deferred."""
        known = self.known_aliases.get(id(parameter))
        if parameter is None or parameter._backward_hooks or id(parameter) not in self._known:
            return None  # not ours, frozen, or with hooks that only autograd can call on the whole gradient
        address = parameter.data_ptr()
        if known is None or known.address != address:
            known = _Aliases(address, parameter.detach(), parameter.detach().requires_grad_())
            self.known_aliases[id(parameter)] = known
        return known


class Tape:
    """The recorded uses of one forward. Used once, in the order forward, I, W."""

    __slots__ = ("_direct", "_outer", "_splitter", "_uses")

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter
        self._uses: list[Use] = []
        self._direct = Sums()  # gradients that I has made and W adds
        self._outer: Tape | None = None

    def __enter__(self) -> Tape:
        self._outer = recording.start(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        recording.stop(self._outer)
        self._outer = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear, recorded where the gradient of ``weight`` or ``bias`` can be deferred."""
        w, b = self._splitter.aliases(weight), self._splitter.aliases(bias)
        if w is None and b is None:
            return recording.torch_linear(x, weight, bias)
        # matmul folds an input that is not contiguous into a matrix only if the weight requires grad.
        # Saved-tensor hooks (activation checkpointing) run the operation again, without a tape, and compare the graphs.
        leaf = not x.requires_grad or (x.dim() > 2 and not x.is_contiguous()) or recording.saved_tensor_hooks()
        y = recording.torch_linear(
            x,
            weight if w is None else w.leaf if leaf else w.plain,
            bias if b is None else b.leaf if leaf else b.plain,
        )
        self._uses.append(LinearUse(x, y.grad_fn, None if w is None else weight, None if b is None else bias))
        return y

    def embedding(self, x: Tensor, weight: Tensor, padding: int | None, scale_by_frequency: bool) -> Tensor:
        """F.embedding, recorded where the gradient of ``weight`` can be deferred."""
        w = self._splitter.aliases(weight)
        y = recording.torch_embedding(
            x, weight if w is None else w.leaf, padding, scale_grad_by_freq=scale_by_frequency
        )
        if w is not None:
            row = -1 if padding is None else padding % weight.shape[0]
            self._uses.append(EmbeddingUse(x, y.grad_fn, weight, row, scale_by_frequency))
        return y

    def backward_input(
        self, outputs: Sequence[Tensor], output_gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """I: gradients of the stage's inputs. The graph is freed; only (x, dy) of the recorded uses stay.

        Args:
            outputs: the outputs of the prepared forward that require grad, or the loss alone.
            output_gradients: one per output, of its shape; None for a scalar loss.
            inputs: the stage inputs whose gradients are wanted.

        Returns:
            one gradient per input, None where no output depends on it.
        """
        uses, parameters = self._uses, self._splitter.parameters
        wanted: list[Any] = [*inputs, *[use.edge() for use in uses], *parameters]
        gradients = torch.autograd.grad(outputs, wanted, output_gradients, allow_unused=True)
        place = len(inputs)
        for use in uses:
            use.dy = gradients[place]
            use.node, use.x = None, use.x.detach()  # lets the graph go now, as an unsplit backward would
            place += 1
        for parameter in parameters:
            gradient = gradients[place]
            place += 1
            if gradient is None:
                continue
            # Vectors (norm weights) cost more to add than to keep, so W adds them together with its own. A parameter
            # that is recorded elsewhere waits too: its gradients are summed first.
            if gradient.dim() < 2 or id(parameter) in self._splitter.known_aliases:
                self._direct.add(parameter, gradient)
            else:
                accumulate([parameter], [owned(parameter, gradient)])
        return gradients[: len(inputs)]

    def backward_weight(self) -> None:
        """W: adds the deferred weight gradients to ``.grad``.

        The uses of one parameter are summed first, latest use first, as autograd's engine does, and then added once.
        """
        sums = Sums()
        # Neither x nor dy requires grad, so nothing here makes a graph.
        for use in reversed(self._uses):
            if use.dy is not None:
                use.add_to(sums)
        for parameter, gradient in zip(self._direct.parameters, self._direct.gradients, strict=True):
            sums.add(parameter, owned(parameter, gradient))
        accumulate(sums.parameters, sums.gradients)
        self._uses, self._direct = [], Sums()
