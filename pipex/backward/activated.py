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
from pipex.backward.choice import TRITON, provider
from pipex.backward.uses import LinearUse, as_rows
from pipex.errors import UnsupportedModule


class Activation(NamedTuple):
    """What was applied, and to what: z, or the gate and up of SwiGLU."""

    name: str
    inputs: tuple[Tensor, ...]


def activation_of(x: Tensor) -> Activation | None:
    """What x is the output of, where the gradient of that can be made in the product's epilogue; else None."""
    node: Any = x.grad_fn
    if node is None or _observed(x):
        return None
    kind = node.name()
    try:  # a saved tensor that was changed since is refused here as in a backward
        if kind == "GeluBackward0":
            return Activation("gelu" if node._saved_approximate == "none" else "gelu_tanh", (node._saved_self,))
        if kind == "SiluBackward0":
            return Activation("silu", (node._saved_self,))
        if kind == "MulBackward0":
            silu, up = node._saved_self, node._saved_other
            inner: Any = None if silu is None else silu.grad_fn
            gated = inner is not None and inner.name() == "SiluBackward0" and not _observed(silu)
            if gated and up.shape == silu.shape and up.dtype is silu.dtype:
                return Activation("swiglu", (inner._saved_self, up))
    except RuntimeError:
        return None
    return None


def worthwhile(activation: Activation, x: Tensor, weight: Tensor) -> bool:
    """Whether Triton, which has such an epilogue, is the faster one for this layer."""
    n, k = weight.shape
    kind = f"dX+{activation.name}"
    return provider(kind, (x.numel() // max(k, 1), n, k), 1, x.dtype, x.dtype, x.device) == TRITON


def activated_linear(use: LinearUse, activation: Activation, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear's output; its node hands dy to the use and the gradients to the activation's inputs.

    Args:
        use: of the activation's output.
        weight, bias: aliases, which need no gradient.
    """
    x = use.x
    y: Tensor = _ActivatedLinear.apply(use, activation.name, weight, bias, *activation.inputs)  # type: ignore[no-untyped-call]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)  # outside: a Function's view must not be changed in place


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, use: LinearUse, name: str, weight: Tensor, bias: Tensor | None, *inputs: Tensor) -> Tensor:
        ctx.use, ctx.activation = use, name
        ctx.save_for_backward(weight, *inputs)
        return recording.torch_linear(as_rows(use.x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if _observed(ctx.use.x):
            raise UnsupportedModule(
                "a gradient was asked for that is not made: of an activation between its function and a linear layer",
                fix="register hooks and call retain_grad before the linear layer runs",
            )
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
        return None, None, None, None, *gradients


def _observed(x: Tensor) -> bool:
    """Whether somebody waits for the gradient of x itself."""
    return bool(x._backward_hooks) or x.retains_grad
