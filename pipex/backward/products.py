"""The matrix products of a linear layer's backward, each by the faster of Triton and torch (``choice`` says which).

    add_weight_gradient      dW += Σ dYᵀ·X and db += Σ dY over several micro-batches
    add_weight_gradients     the same for several layers
    input_gradient           dX = dY·W, with the gradient of an activation
    swiglu_input_gradient    the same for SwiGLU, with its two results

Operands are checked before anything is changed, and alike for both providers. Neither is seen by autograd: call them
under ``torch.no_grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipex.backward.choice import TORCH, TRITON, Provider, provider
from pipex.triton_kernels.checks import (
    OPERAND_DTYPES,
    check_activation,
    check_input_gradient,
    check_weight_gradients,
)

DTYPES = (*OPERAND_DTYPES, torch.float64)
"""Of operands; float64 goes by torch always."""

_INPUT_KINDS = {
    None: "dX",
    "relu": "dX+relu",
    "silu": "dX+silu",
    "gelu": "dX+gelu",
    "gelu_tanh": "dX+gelu_tanh",
    "swiglu": "dX+swiglu",
}
_aten = torch.ops.aten
# (dh, z, out): dh·act'(z), by the kernels that autograd uses
_ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda dh, z, out: _aten.threshold_backward.grad_input(dh, z, 0, grad_input=out),
    "silu": lambda dh, z, out: _aten.silu_backward.grad_input(dh, z, grad_input=out),
    "gelu": lambda dh, z, out: _aten.gelu_backward.grad_input(dh, z, grad_input=out),
    "gelu_tanh": lambda dh, z, out: _aten.gelu_backward.grad_input(dh, z, approximate="tanh", grad_input=out),
}


def add_weight_gradient(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weight_grad: Tensor,
    bias_grad: Tensor | None = None,
    *,
    exact: bool = False,
) -> None:
    """weight_grad += Σ dYᵀ·X and bias_grad += Σ dY, over micro-batches in the given order.

    Args:
        dys: [T, N] of each micro-batch; bfloat16, float16, float32 or float64, elements of a row side by side. T may
            differ between micro-batches, and be 0.
        xs: [T, K] of each, the same dtype.
        weight_grad: [N, K], of that dtype, or float32 where that is shorter; added to.
        bias_grad: [N] of weight_grad's dtype, without gaps; added to.
        exact: one product per micro-batch, by torch, with the bits that so many calls would give. Otherwise the sum of
            several micro-batches may be rounded once, which is no less accurate; the same bits run after run.

    Raises:
        InputError: where a shape, dtype, stride or device does not fit; nothing has been changed.
    """
    if not exact and _weight_provider(dys, weight_grad, bias_grad is not None) == TRITON:
        from pipex.triton_kernels.weight_gradient import weight_gradient

        weight_gradient(dys, xs, weight_grad, bias_grad)
        return
    check_weight_gradients([dys], [xs], [weight_grad], None if bias_grad is None else [bias_grad], DTYPES)
    add_by_torch(dys, xs, weight_grad, bias_grad)


def add_weight_gradients(
    dys: Sequence[Sequence[Tensor]],
    xs: Sequence[Sequence[Tensor]],
    weight_grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor] | None = None,
    *,
    exact: bool = False,
) -> None:
    """``add_weight_gradient`` for several layers of one shape, in one launch where Triton makes it.

    Args:
        dys, xs: for each layer, as for ``add_weight_gradient``; as many micro-batches in each, of one dtype.
        weight_grads, bias_grads: of each layer; no two may overlap.
        exact: as for ``add_weight_gradient``.

    Raises:
        InputError: where a number, shape, dtype, stride or device does not fit; nothing has been changed.
    """
    bias = bias_grads is not None
    if not exact and dys and weight_grads and _weight_provider(dys[0], weight_grads[0], bias) == TRITON:
        from pipex.triton_kernels.weight_gradient import grouped_weight_gradient

        grouped_weight_gradient(dys, xs, weight_grads, bias_grads)
        return
    check_weight_gradients(dys, xs, weight_grads, bias_grads, DTYPES)
    for layer, (dy, x, weight_grad) in enumerate(zip(dys, xs, weight_grads, strict=True)):
        add_by_torch(dy, x, weight_grad, None if bias_grads is None else bias_grads[layer])


def add_by_torch(dys: Sequence[Tensor], xs: Sequence[Tensor], weight_grad: Tensor, bias_grad: Tensor | None) -> None:
    """One product with beta = 1 per micro-batch, in rising order; on a GPU that is cuBLAS.

    Args:
        dys, xs: [T, N] and [T, K] of each micro-batch.
        weight_grad, bias_grad: [N, K] and [N], in the operands' dtype or in float32; then no product is rounded to
            fewer bits on its way into them.
    """
    for dy, x in zip(dys, xs, strict=True):
        if not dy.shape[0]:  # nothing to add: no library need be asked what it makes of that
            continue
        if weight_grad.dtype is dy.dtype:
            weight_grad.addmm_(dy.t(), x)
        elif dy.is_cuda:
            torch.addmm(weight_grad, dy.t(), x, out_dtype=weight_grad.dtype, out=weight_grad)
        else:  # torch has products of mixed dtypes on GPUs only
            weight_grad.addmm_(dy.t().to(weight_grad.dtype), x.to(weight_grad.dtype))
        if bias_grad is not None:
            bias_grad += dy.sum(0, dtype=bias_grad.dtype)


def input_gradient(dy: Tensor, weight: Tensor, *, activation: str | None = None, z: Tensor | None = None) -> Tensor:
    """dZ = (dY·W)·act'(Z) for a layer y = act(z)·Wᵀ; without an activation dX = dY·W.

    Args:
        dy: [T, N], gradient of the layer's output; bfloat16, float16, float32 or float64, elements of a row side by
            side.
        weight: [N, K] of the same dtype.
        activation: "relu", "silu", "gelu" or "gelu_tanh"; needs z.
        z: [T, K], the saved pre-activation.

    Returns:
        [T, K], of the same dtype.

    Raises:
        InputError: where a shape, dtype, stride or device does not fit.
    """
    check_activation(activation, z)
    if _input_provider(activation, dy, weight) == TRITON:
        from pipex.triton_kernels import input_gradient as kernels

        return kernels.input_gradient(dy, weight, activation=activation, z=z)
    check_input_gradient(dy, weight, {} if z is None else {"z": z}, dtypes=DTYPES)
    return input_gradient_by_torch(dy, weight, activation=activation, z=z)


def input_gradient_by_torch(
    dy: Tensor, weight: Tensor, *, activation: str | None = None, z: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """A product, and torch's kernel for the activation's gradient after it, in place."""
    dh = torch.mm(dy, weight, out=out)
    return dh if activation is None or z is None else _ACTIVATION_GRADIENTS[activation](dh, z, dh)


def swiglu_input_gradient(dy: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up in y = (silu(gate)·up)·Wᵀ.

    Args:
        dy: [T, N]; bfloat16, float16, float32 or float64, elements of a row side by side.
        weight: [N, K] of the same dtype.
        gate, up: [T, K], the saved pre-activations; rows may lie apart, as in the two halves of one [T, 2K] matrix.

    Returns:
        (d_gate, d_up), [T, K] each: the two halves of one new [T, 2K] matrix.

    Raises:
        InputError: where a shape, dtype, stride or device does not fit.
    """
    if _input_provider("swiglu", dy, weight) == TRITON:
        from pipex.triton_kernels import input_gradient as kernels

        return kernels.swiglu_input_gradient(dy, weight, gate, up)
    check_input_gradient(dy, weight, {"gate": gate, "up": up}, dtypes=DTYPES)
    return swiglu_input_gradient_by_torch(dy, weight, gate, up)


def swiglu_input_gradient_by_torch(
    dy: Tensor, weight: Tensor, gate: Tensor, up: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """A product, and four of torch's element-wise kernels after it."""
    dh = torch.mm(dy, weight)
    d_gate, d_up = dh.new_empty(dh.shape[0], 2 * dh.shape[1]).chunk(2, 1) if out is None else out
    torch.mul(dh, torch.nn.functional.silu(gate), out=d_up)
    _ACTIVATION_GRADIENTS["silu"](dh.mul_(up), gate, d_gate)
    return d_gate, d_up


# These two run before the operands are checked: where a shape is not what it must be, any answer will do.


def _weight_provider(dys: Sequence[Tensor], weight_grad: Tensor, bias: bool) -> Provider:
    count = len(dys)
    if not count or weight_grad.dim() != 2 or not dys[0].dim():
        return TORCH
    dy = dys[0]  # its T stands for all: micro-batches are alike, or differ by a sample
    n, k = weight_grad.shape
    kind = "dW+db" if bias else "dW"
    return provider(kind, (dy.shape[0], n, k), count, dy.dtype, weight_grad.dtype, weight_grad.device)


def _input_provider(activation: str | None, dy: Tensor, weight: Tensor) -> Provider:
    if dy.dim() != 2 or weight.dim() != 2:
        return TORCH
    n, k = weight.shape
    return provider(_INPUT_KINDS[activation], (dy.shape[0], n, k), 1, dy.dtype, dy.dtype, dy.device)
