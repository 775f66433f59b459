"""Linear layers, on an input of any form.

What torch takes apart, an input that is no matrix, is taken apart here as ATen does where the weight requires grad
(aten/src/ATen/native/Linear.cpp), so that outputs and gradients have its bits.
"""

from __future__ import annotations

from torch import Tensor

from pipex.backward.activated import activated_linear, activation_of, worthwhile
from pipex.backward.operations.matmul import summed, torch_mm
from pipex.backward.recording import Recorder, torch_linear
from pipex.backward.uses import LinearUse, Sums
from pipex.backward.weights import Layer, Weight
from pipex.torch_internals import any_autocast, dispatch_modes, top_saved_tensors_hooks, unsafe_view


class UnfoldedLinearUse(LinearUse):
    """A linear layer whose input torch makes a matrix of by copying it; dy is that of the layer's output."""

    __slots__ = ()

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        bias, self.bias = self.bias, None
        if bias is not None:
            sums.add(bias, summed(dy, dy.shape[-1:]))
        super().add_to(sums, dy if dy.dim() > 1 else dy.unsqueeze(0))


def linear(tape: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, recorded where the gradient of ``weight`` or ``bias`` can be deferred."""
    layer = tape.layers.get(id(weight))
    lower = any_autocast()
    if (
        layer is not None
        and not lower
        and x.requires_grad
        and top_saved_tensors_hooks(False) is None
        and layer.is_as_it_was(bias)
        and _folds(x)
    ):  # as below, where all that is asked is known
        y = torch_linear(x, layer.weight_alias, layer.bias_alias)
        tape.hand_over(y, LinearUse(tape, x, weight, bias))
        return y
    if lower:
        x = tape.cast(x)
    w, b = tape.weight(weight, lower), tape.weight(bias, lower)
    if (w is None and b is None) or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return torch_linear(x, weight, bias)
    if not _folds(x):
        return _of_rows(tape, x, weight, bias, w, b)
    kept = x.new_empty(0) if w is None else x  # only the weight's gradient needs x, and that it stays unchanged
    use = LinearUse(tape, kept, None if w is None else w.target, None if b is None else b.target)
    if w is not None and (b is None) == (bias is None) and tape.fuses(x):
        activation = activation_of(x, tape.first_node)
        if activation is not None and worthwhile(activation, x, w.alias):
            return activated_linear(use, x, activation, w.alias, None if b is None else b.alias)
    known = bias is None or (b is not None and b.target is bias)
    if known and w is not None and w.target is weight and not tape.fuses(x):
        tape.layers[id(weight)] = Layer(weight, bias, w.alias, None if b is None else b.alias)
    weight, bias = weight if w is None else w.alias, bias if b is None else b.alias
    return tape.product(use, torch_linear, x, weight, bias)


def _folds(x: Tensor) -> bool:
    """Whether torch makes a matrix of it in any case. Of one with other strides, if only of a dimension of one element,
    it depends on the weight requiring grad."""
    dimensions = x.dim()
    if dimensions == 2:
        return True
    if dimensions < 2 or not x.is_contiguous():
        return False
    shape = x.shape
    if 1 not in shape:
        return True
    strides = x.stride()
    return all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(dimensions - 2))


def _of_rows(
    tape: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None, w: Weight | None, b: Weight | None
) -> Tensor:
    """Of an x, cast by autocast if at all, that has gaps or is a vector; ``w`` and ``b`` as weights."""
    rows, shape = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    kept = x.new_empty(0) if w is None else rows
    use = UnfoldedLinearUse(tape, kept, None if w is None else w.target, None if b is None else b.target)
    if b is not None:
        bias = b.alias
    if w is None:  # then torch looks at this weight itself
        return tape.product(use, torch_linear, x, weight, bias)
    if x.dim() == 1:  # where it asks nothing of the weight
        return tape.product(use, torch_linear, x, w.alias, bias)

    def run(rows: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y = unsafe_view(torch_mm(rows, w.t()), (*shape, w.shape[0]))
        if b is None:
            return y
        # In place only where torch does it so: a selective checkpoint may have kept the product, and gives it again.
        b = b.to(y.dtype)
        return y.add(b) if dispatch_modes() else y.add_(b)

    return tape.product(use, run, rows, w.alias, bias)
