"""A linear layer on an activation, y = act(z)·Wᵀ + b, whose I gives the gradient of z in one product.

      z ──► act ──► x ──► linear ──► y           autograd: dX = dY·W, written; then act'(z)·dX by a kernel of its own
      └─────────────────────┘                    here: one edge past the activation, and dZ = (dY·W)·act'(z) in the
                                                 product's epilogue (``products.input_gradient``)

Whatever else x is used for goes through the activation's own node, and autograd sums both at z.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipex.backward import products, recording
from pipex.backward.accumulate import hooks_on
from pipex.backward.choice import TRITON, provider
from pipex.backward.passes import announced
from pipex.backward.uses import LinearUse, as_rows
from pipex.errors import UnsupportedModule
from pipex.torch_internals import (
    hooks_of,
    raw_other,
    raw_self,
    saved_approximate,
    saved_other,
    saved_self,
    sequence_number,
)


class Activation(NamedTuple):
    """What was applied, to what (z, or the gate and up of SwiGLU), and what was made that gets no gradient here."""

    name: str
    inputs: tuple[Tensor, ...]
    passed_by: tuple[Tensor, ...]


def activation_of(x: Tensor, since: int) -> Activation | None:
    """What x is the output of, where the gradient of that can be made in the product's epilogue; else None.

    Args:
        since: the sequence number of the stage's first node. What was made before may be an input of the stage.
    """
    node: Any = x.grad_fn
    if node is None:
        return None
    kind = node.name()
    found = None
    try:  # a saved tensor that was changed since is refused here as in a backward
        if kind == "GeluBackward0" and _is_at_hand(raw_self(node)):
            name = "gelu" if saved_approximate(node) == "none" else "gelu_tanh"
            found = Activation(name, (saved_self(node),), (x,))
        elif kind == "SiluBackward0" and _is_at_hand(raw_self(node)):
            found = Activation("silu", (saved_self(node),), (x,))
        elif kind == "MulBackward0" and _is_at_hand(raw_self(node)) and _is_at_hand(raw_other(node)):
            silu, up = saved_self(node), saved_other(node)
            inner: Any = None if silu is None else silu.grad_fn
            gated = inner is not None and inner.name() == "SiluBackward0" and _is_at_hand(raw_self(inner))
            if gated and up.shape == silu.shape and up.dtype is silu.dtype:
                found = Activation("swiglu", (saved_self(inner), up), (x, silu))
    except RuntimeError:
        return None
    return None if found is None or any(_is_wanted(tensor, since) for tensor in found.passed_by) else found


def worthwhile(activation: Activation, x: Tensor, weight: Tensor) -> bool:
    """Whether Triton, which has such an epilogue, is the faster one for this layer."""
    n, k = weight.shape
    kind = f"dX+{activation.name}"
    return provider(kind, (x.numel() // max(k, 1), n, k), 1, x.dtype, x.dtype, x.device) == TRITON


def activated_linear(use: LinearUse, x: Tensor, activation: Activation, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear's output; its node hands dy to the use and the gradients to the activation's inputs.

    Args:
        use: of the activation's output, x.
        weight, bias: aliases, which need no gradient.
    """
    y: Tensor = _ActivatedLinear.apply(  # type: ignore[no-untyped-call]
        use, as_rows(x.detach()), activation, weight, bias, *activation.inputs
    )
    # Viewed outside: a view that a Function returns must not be changed in place.
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        use: LinearUse,
        x: Tensor,
        activation: Activation,
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.use, ctx.activation, ctx.passed_by = use, activation.name, activation.passed_by
        ctx.save_for_backward(weight, *inputs)
        return recording.torch_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if any(_observed(tensor) for tensor in ctx.passed_by):
            raise UnsupportedModule(
                "a gradient was asked for that is not made: of an activation between its function and a linear layer",
                fix="register hooks and call retain_grad before the linear layer runs",
            )
        ctx.passed_by = ()  # so that no graph hangs on an output that is kept
        ctx.use.capture(dy)
        weight, *inputs = ctx.saved_tensors
        dy, matrices = as_rows(dy), [as_rows(z) for z in inputs]
        found: tuple[Tensor, ...]
        if ctx.activation == "swiglu":
            gate, up = matrices
            found = products.swiglu_input_gradient(dy, weight, gate, up)
        else:
            found = (products.input_gradient(dy, weight, activation=ctx.activation, z=matrices[0]),)
        gradients = [gradient.view(z.shape) for gradient, z in zip(found, inputs, strict=True)]
        return None, None, None, None, None, *gradients


def _is_at_hand(saved: Any) -> bool:
    """Whether what a node has saved is that itself: no hook would have to load it or, in a checkpoint, to compute it.
    A torch that cannot tell has no ``unpack_hook``."""
    return getattr(saved, "unpack_hook", saved) is None


def _is_wanted(x: Tensor, since: int) -> bool:
    """Whether the gradient of x must be made: for somebody who waits for it or, where x is older, for who has made x.

    On nodes there are the hooks of ``torch.nn.Module.register_backward_hook``.
    """
    node: Any = x.grad_fn
    return _observed(x) or sequence_number(node) < since or any(hooks_on(node))


def _observed(x: Tensor) -> bool:
    """Whether somebody waits for the gradient of x itself."""
    return x.retains_grad or any(not isinstance(key, announced) for key in hooks_of(x) or ())
