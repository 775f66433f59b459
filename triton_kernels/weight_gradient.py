"""The weight gradient of a linear layer: dW += Σ dYᵀ·X over several micro-batches, with db += Σ dY in the same pass.

Where the kernel finds its operands:

    slabs   a tuple of up to 4 operands, each one micro-batch or a slab of several at equal distance; they are kernel
            parameters, so that nothing is copied to the device for a launch.
    table   a device array of addresses, for any number of micro-batches, and for several layers of one shape.
"""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipex.triton_kernels.checks import MicroBatches, check_weight_gradients
from pipex.triton_kernels.launch import HOPPER, Launch, capability, check_device, describable, describe, upcast
from pipex.triton_kernels.weight_gradient_kernel import weight_gradient_kernel

# Slabs of one launch. Each makes the kernel's code longer, and each number of them is compiled anew.
SLABS = 4


def weight_gradient_reference(
    dys: Tensor | Sequence[Tensor], xs: Tensor | Sequence[Tensor], weight_grad: Tensor, bias_grad: Tensor | None = None
) -> None:
    """``weight_gradient`` in torch: one product per micro-batch."""
    for dy, x in zip(dys, xs, strict=True):
        weight_grad += dy.t() @ x
        if bias_grad is not None:
            bias_grad += dy.sum(0)


class Tiles(NamedTuple):
    """Block sizes, warps and pipeline stages: the largest that compile without spilling (tests gate it)."""

    t: int
    n: int
    k: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, exact: bool, descriptors: bool) -> Tiles:
    if dtype is torch.float32:  # no tensor core multiplies float32 without rounding it: small tiles, plain cores
        return Tiles(32, 64, 64, 4, 2)
    if not descriptors:
        return Tiles(32, 128, 128, 8, 4)
    return Tiles(64, 128, 128, 8, 4) if exact else Tiles(64, 128, 256, 8, 4)


def describes(slabs: MicroBatches, weight_grad: Tensor, capability: tuple[int, int]) -> bool:
    """Whether the kernel reads and writes these by descriptors."""
    operands = [tensor for slab in slabs for tensor in slab]
    return capability == HOPPER and operands[0].dtype is not torch.float32 and describable(*operands, weight_grad)


def plan_slabs(
    slabs: MicroBatches,
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    exact: bool,
    capability: tuple[int, int],
) -> Launch:
    """The launch for checked operands: slabs [n, T, N] and [n, T, K], with the same n in all of them; ``exact`` only
    where ``describes``."""
    first_dy = slabs[0][0]
    descriptors = describes(slabs, weight_grad, capability)
    block = tiles(first_dy.dtype, exact, descriptors)
    parameters = []
    for dy, x in slabs:
        strides = (dy.stride(0), dy.stride(1), x.stride(0), x.stride(1))
        described: tuple[Any, Any] = dy, x
        if descriptors:
            described = describe(dy, 1, block.t, block.n), describe(x, 1, block.t, block.k)
        parameters.append((*described, dy.shape[1], *strides))
    gradient: Any = weight_grad
    if descriptors and not exact:
        gradient = describe(weight_grad, block.n, block.k // 2)
    return _plan(
        (1, *weight_grad.shape),
        {
            "table": None,
            "slabs": tuple(parameters),
            "weight_gradient": gradient,
            "bias_gradient": bias_grad,
            "count": first_dy.shape[0],
            "dy_stride": None,
            "x_stride": None,
            "weight_gradient_stride": weight_grad.stride(0),
        },
        (first_dy.dtype, weight_grad.dtype),
        bias_grad is not None,
        exact,
        descriptors,
        block,
    )


def plan_table(
    table: Tensor, dy: Tensor, x: Tensor, weight_grad: Tensor, bias: bool, capability: tuple[int, int]
) -> Launch:
    """The launch for a checked table [groups, 2 + 3·n] on the device, all of whose operands are laid out like these."""
    descriptors = describes([(dy, x)], weight_grad, capability)
    block = tiles(dy.dtype, False, descriptors)
    return _plan(
        (table.shape[0], *weight_grad.shape),
        {
            "table": table,
            "slabs": None,
            "weight_gradient": None,
            "bias_gradient": None,
            "count": (table.shape[1] - 2) // 3,
            "dy_stride": dy.stride(0),
            "x_stride": x.stride(0),
            "weight_gradient_stride": weight_grad.stride(0),
        },
        (dy.dtype, weight_grad.dtype),
        bias,
        False,
        descriptors,
        block,
    )


def _plan(
    shape: tuple[int, int, int],
    arguments: dict[str, Any],
    dtypes: tuple[torch.dtype, torch.dtype],
    bias: bool,
    exact: bool,
    descriptors: bool,
    block: Tiles,
) -> Launch:
    groups, n, k = shape
    dtype, gradient_dtype = (getattr(tl, str(dtype).removeprefix("torch.")) for dtype in dtypes)
    return Launch(
        kernel=weight_gradient_kernel,
        grid=(triton.cdiv(n, block.n) * triton.cdiv(k, block.k), groups),
        arguments=arguments | {"N": n, "K": k},
        constants={
            "EXACT": exact,
            "BIAS": bias,
            "DTYPE": dtype,
            "GRADIENT_DTYPE": gradient_dtype,
            "DESCRIPTORS": descriptors,
            "UPCAST": upcast(dtypes[0]),
            "BLOCK_T": block.t,
            "BLOCK_N": block.n,
            "BLOCK_K": block.k,
        },
        warps=block.warps,
        stages=block.stages,
    )


def weight_gradient(
    dys: Tensor | Sequence[Tensor],
    xs: Tensor | Sequence[Tensor],
    weight_grad: Tensor,
    bias_grad: Tensor | None = None,
    *,
    exact: bool = False,
) -> None:
    """weight_grad += Σ dYᵀ·X and bias_grad += Σ dY, over micro-batches in the given order.

    Args:
        dys: [T, N] of each micro-batch, or a slab [n, T, N] of all; bfloat16, float16 or float32.
        xs: [T, K] of each, or a slab [n, T, K]; the same dtype. T may differ between micro-batches.
        weight_grad: [N, K], float32 or the operands' dtype; added to.
        bias_grad: [N] of the same dtype, without gaps; added to.
        exact: round after each micro-batch, so that the bits are those of one such call per micro-batch. Otherwise the
            sum of all is rounded once, which is faster and no less accurate. Both give the same bits run after run.

    Raises:
        InputError: where a shape, dtype, stride or device does not fit.
    """
    grouped_weight_gradient([dys], [xs], [weight_grad], None if bias_grad is None else [bias_grad], exact=exact)


def grouped_weight_gradient(
    dys: Sequence[Tensor | Sequence[Tensor]],
    xs: Sequence[Tensor | Sequence[Tensor]],
    weight_grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor] | None = None,
    *,
    exact: bool = False,
) -> None:
    """``weight_gradient`` for several layers whose weights have one shape, in one launch where they are laid out alike.

    Args:
        dys, xs: for each layer, as for ``weight_gradient``; dtypes are common to all.
        weight_grads, bias_grads: of each layer; no two may overlap.
        exact: as for ``weight_gradient``.

    Raises:
        InputError: where a number of layers, a shape, dtype, stride or device does not fit.
    """
    groups = check_weight_gradients(dys, xs, weight_grads, bias_grads)
    if weight_grads:
        check_device(weight_grads[0].device)
    groups = [[pair for pair in group if pair[0].shape[0]] for group in groups]  # those without rows add nothing
    if not weight_grads or not weight_grads[0].numel() or not any(groups):
        return
    device = weight_grads[0].device
    biases: Sequence[Tensor | None] = [None] * len(groups) if bias_grads is None else bias_grads
    many = len(groups) > 1 or (len(groups[0]) > SLABS and not isinstance(dys[0], Tensor))
    if many and not exact and _tabular(groups, weight_grads):
        table = _table(groups, weight_grads, biases)
        launch = plan_table(table, *groups[0][0], weight_grads[0], bias_grads is not None, capability(device))
        # The kernel makes descriptors, in memory that Triton asks the allocator of its context for.
        contextvars.copy_context().run(_run_with_allocator, launch, device)
        return
    for dy, x, group, weight_grad, bias_grad in zip(dys, xs, groups, weight_grads, biases, strict=True):
        if not group:
            continue
        matrices = [(dy.unsqueeze(0), x.unsqueeze(0)) for dy, x in group]
        slabs, per_launch = matrices, SLABS
        if isinstance(dy, Tensor) and isinstance(x, Tensor):
            slabs = [(dy, x)]
        if exact:
            # The form that rounds in between spills with several slabs and without descriptors: then a launch each.
            slabs, per_launch = (slabs if describes(slabs, weight_grad, capability(device)) else matrices), 1
        for start in range(0, len(slabs), per_launch):
            chosen = slabs[start : start + per_launch]
            rounds = exact and describes(chosen, weight_grad, capability(device))
            plan_slabs(chosen, weight_grad, bias_grad, rounds, capability(device)).run(device)


def _tabular(groups: list[MicroBatches], weight_grads: Sequence[Tensor]) -> bool:
    """Whether one table can describe them: as many micro-batches in each group, rows equally far apart, all aligned."""
    pairs = [pair for group in groups for pair in group]
    return (
        len({len(group) for group in groups}) == 1
        and len({(dy.stride(0), x.stride(0)) for dy, x in pairs}) == 1
        and len({gradient.stride(0) for gradient in weight_grads}) == 1
        and describable(*weight_grads, *(tensor for pair in pairs for tensor in pair))
    )


def _table(groups: list[MicroBatches], weight_grads: Sequence[Tensor], bias_grads: Sequence[Tensor | None]) -> Tensor:
    rows = [
        [weight_grad.data_ptr(), 0 if bias_grad is None else bias_grad.data_ptr()]
        + [number for dy, x in group for number in (dy.data_ptr(), x.data_ptr(), dy.shape[0])]
        for group, weight_grad, bias_grad in zip(groups, weight_grads, bias_grads, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64)
    device = weight_grads[0].device
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _run_with_allocator(launch: Launch, device: torch.device) -> None:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)  # torch aligns to 512 bytes

    triton.set_allocator(allocate)
    launch.run(device)
