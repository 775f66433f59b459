"""The input gradient of a linear layer: dX = dY·W, with the gradient of the activation before it in the epilogue.

For a layer y = act(z)·Wᵀ it gives dZ = (dY·W)·act'(z) at once: the product stays in registers, in float32, where a
kernel of its own would read and write it in memory once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipex.triton_kernels.activations import (
    activation_gradient,
    activation_gradient_reference,
    swiglu_gradient,
    swiglu_gradient_reference,
)
from pipex.triton_kernels.checks import check_activation, check_input_gradient
from pipex.triton_kernels.launch import HOPPER, Launch, capability, check_device, describable, describe, upcast
from pipex.triton_kernels.tiles import halves, load_tile, multiply, store_tile, tile_position


def input_gradient_reference(
    dy: Tensor, weight: Tensor, *, activation: str | None = None, z: Tensor | None = None
) -> Tensor:
    """``input_gradient`` in torch."""
    dh = dy @ weight
    return dh if activation is None or z is None else activation_gradient_reference(dh, z, activation)


def swiglu_input_gradient_reference(dy: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """``swiglu_input_gradient`` in torch."""
    return swiglu_gradient_reference(dy @ weight, gate, up)


@triton.jit
def input_gradient_kernel(
    dy,  # [T, N]
    weight,  # [N, K]
    z,  # [T, K], the pre-activation (SwiGLU: its gate half); None without activation
    up,  # [T, K], SwiGLU only
    dz,  # [T, K]
    d_up,  # [T, K], SwiGLU only
    dy_stride,
    weight_stride,
    z_stride,
    up_stride,
    dz_stride,
    d_up_stride,
    T,
    N,
    K,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(K, BLOCK_K))
    row, column = row * BLOCK_T, column * BLOCK_K

    dh = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for n in range(0, N, BLOCK_N):
        dy_tile = load_tile(dy, dy_stride, row, n, T, N, BLOCK_T, BLOCK_N, DESCRIPTORS)
        weight_tile = load_tile(weight, weight_stride, n, column, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS)
        dh = multiply(dy_tile, weight_tile, dh, UPCAST)

    left, right = halves(dh)
    for half in tl.static_range(2):
        dh = left if half == 0 else right
        if half == 1:
            column += BLOCK_K // 2
        if ACTIVATION is None:
            store_tile(dz, dz_stride, row, column, T, K, dh, DTYPE, DESCRIPTORS, UPCAST)
        else:
            z_tile = load_tile(z, z_stride, row, column, T, K, BLOCK_T, BLOCK_K // 2, DESCRIPTORS).to(tl.float32)
            if ACTIVATION == "swiglu":
                up_tile = load_tile(up, up_stride, row, column, T, K, BLOCK_T, BLOCK_K // 2, DESCRIPTORS)
                d_gate_tile, d_up_tile = swiglu_gradient(dh, z_tile, up_tile.to(tl.float32))
                store_tile(dz, dz_stride, row, column, T, K, d_gate_tile, DTYPE, DESCRIPTORS, UPCAST)
                store_tile(d_up, d_up_stride, row, column, T, K, d_up_tile, DTYPE, DESCRIPTORS, UPCAST)
            else:
                dz_tile = dh * activation_gradient(z_tile, ACTIVATION)
                store_tile(dz, dz_stride, row, column, T, K, dz_tile, DTYPE, DESCRIPTORS, UPCAST)


class Tiles(NamedTuple):
    """Block sizes, warps and pipeline stages: the largest that compile without spilling (tests gate it)."""

    t: int
    n: int
    k: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, activation: str | None, descriptors: bool) -> Tiles:
    if dtype is torch.float32:  # no tensor core multiplies float32 without rounding it: small tiles, plain cores
        return Tiles(64, 32, 64, 4, 2)
    if not descriptors:
        return Tiles(128, 32, 64, 8, 4) if activation == "swiglu" else Tiles(128, 32, 128, 8, 4)
    return Tiles(128, 64, 128, 8, 3) if activation == "swiglu" else Tiles(128, 64, 256, 8, 3)


def plan_input_gradient(
    dy: Tensor,
    weight: Tensor,
    activation: str | None,
    saved: tuple[Tensor, ...],
    out: tuple[Tensor, ...],
    capability: tuple[int, int],
) -> Launch:
    """The launch for checked operands.

    ``saved`` is empty, (z,) or (gate, up); ``out`` is (dz,) or (d_gate, d_up).
    """
    (t, n), k = dy.shape, weight.shape[1]
    descriptors = capability == HOPPER and dy.dtype is not torch.float32 and describable(dy, weight, *saved, *out)
    block = tiles(dy.dtype, activation, descriptors)

    def operand(tensor: Tensor | None, rows: int, columns: int) -> Any:
        return describe(tensor, rows, columns) if descriptors and tensor is not None else tensor

    epilogue = dict(zip(("z", "up"), saved, strict=False)) | dict(zip(("dz", "d_up"), out, strict=False))
    arguments = {
        "dy": operand(dy, block.t, block.n),
        "weight": operand(weight, block.n, block.k),
        "dy_stride": dy.stride(0),
        "weight_stride": weight.stride(0),
        "T": t,
        "N": n,
        "K": k,
    }
    for name in ("z", "up", "dz", "d_up"):
        tensor = epilogue.get(name)
        arguments[name] = operand(tensor, block.t, block.k // 2)
        arguments[f"{name}_stride"] = None if tensor is None else tensor.stride(0)
    return Launch(
        kernel=input_gradient_kernel,
        grid=(triton.cdiv(t, block.t) * triton.cdiv(k, block.k),),
        arguments=arguments,
        constants={
            "ACTIVATION": activation,
            "DTYPE": getattr(tl, str(dy.dtype).removeprefix("torch.")),
            "DESCRIPTORS": descriptors,
            "UPCAST": upcast(dy.dtype),
            "BLOCK_T": block.t,
            "BLOCK_N": block.n,
            "BLOCK_K": block.k,
        },
        warps=block.warps,
        stages=block.stages,
    )


def input_gradient(
    dy: Tensor, weight: Tensor, *, activation: str | None = None, z: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """dZ = (dY·W)·act'(Z); without an activation dX = dY·W.

    Args:
        dy: [T, N], gradient of the layer's output; bfloat16, float16 or float32.
        weight: [N, K] of the same dtype.
        activation: "relu", "silu", "gelu" or "gelu_tanh"; needs z.
        z: [T, K], the saved pre-activation.
        out: [T, K], where to write; rows may lie apart.

    Raises:
        InputError: where a shape, dtype, stride or device does not fit.
    """
    check_activation(activation, z)
    saved = {} if z is None else {"z": z}
    return _launch(dy, weight, activation, saved, None if out is None else (out,))[0]


def swiglu_input_gradient(
    dy: Tensor, weight: Tensor, gate: Tensor, up: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up in y = (silu(gate)·up)·Wᵀ.

    Args:
        dy: [T, N]; bfloat16, float16 or float32.
        weight: [N, K] of the same dtype.
        gate, up: [T, K], the saved pre-activations; rows may lie apart, as in the two halves of one [T, 2K] matrix.
        out: where to write d_gate and d_up, [T, K] each.

    Returns:
        (d_gate, d_up). Without ``out`` they are the two halves of one new [T, 2K] matrix, ready for the I and W of a
        projection that makes gate and up in one product.

    Raises:
        InputError: where a shape, dtype, stride or device does not fit.
    """
    d_gate, d_up = _launch(dy, weight, "swiglu", {"gate": gate, "up": up}, out)
    return d_gate, d_up


def _launch(
    dy: Tensor,
    weight: Tensor,
    activation: str | None,
    saved: dict[str, Tensor],
    out: tuple[Tensor, ...] | None,
) -> tuple[Tensor, ...]:
    check_input_gradient(dy, weight, saved, out or ())
    check_device(dy.device)
    t, k = dy.shape[0], weight.shape[1]
    if out is None:
        count = max(1, len(saved))
        joint = dy.new_empty(t, count * k)
        out = tuple(joint[:, i * k : (i + 1) * k] for i in range(count))
    if t and k:
        plan_input_gradient(dy, weight, activation, tuple(saved.values()), out, capability(dy.device)).run(dy.device)
    return out
