"""Gradients of the activations between two linear layers, in float32, and plain references beside them.

The names are torch's: ``gelu`` is the exact one (erf), ``gelu_tanh`` is ``F.gelu(approximate="tanh")``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


def activation_gradient_reference(dh: Tensor, z: Tensor, activation: str) -> Tensor:
    """dh·act'(z), as autograd makes it. dh, z and the result have one shape and dtype."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(FORWARD[activation](z), z, dh)[0]


def swiglu_gradient_reference(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of silu(gate)·up for gate and up, as autograd makes them. All have one shape and dtype."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    with torch.enable_grad():
        d_gate, d_up = torch.autograd.grad(F.silu(gate) * up, (gate, up), dh)
    return d_gate, d_up


@triton.jit
def silu_gradient(z):
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit
def gelu_gradient(z):
    """Φ(z) + z·φ(z), with one exponential for both.

    1 - Φ(|z|) = polynomial(t)·exp(-z²/2) with t = 1/(1 + p·|z|/√2): Abramowitz and Stegun 7.1.26, within 7.5e-8, which
    is float32's own rounding. The erf of the device library takes so many registers that the epilogue spills.
    """
    exponential = tl.exp(-0.5 * z * z)
    t = 1 / (1 + 0.3275911 * 0.7071067811865476 * tl.abs(z))
    polynomial = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    tail = 0.5 * polynomial * exponential
    return tl.where(z < 0, tail, 1 - tail) + z * 0.3989422804014327 * exponential


@triton.jit
def gelu_tanh_gradient(z):
    # (1 + tanh u)/2 = sigmoid(2u), which needs no tanh: neither the interpreter nor sm_80 has a good one.
    square = z * z
    s = tl.sigmoid(2 * 0.7978845608028654 * z * (1 + 0.044715 * square))
    return s + z * s * (1 - s) * 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * square)


@triton.jit
def activation_gradient(z, ACTIVATION: tl.constexpr):
    """act'(z) for float32 z."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)  # as in torch, NaN lets the gradient through
    elif ACTIVATION == "silu":
        return silu_gradient(z)
    elif ACTIVATION == "gelu":
        return gelu_gradient(z)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return gelu_tanh_gradient(z)


@triton.jit
def swiglu_gradient(dh, gate, up):
    """Gradients of silu(gate)·up for gate and up; all float32."""
    return dh * up * silu_gradient(gate), dh * gate * tl.sigmoid(gate)
