"""The backward of RMSNorm and LayerNorm: dX at once, and partial rows of the weight's and bias's gradients.

Each program walks every P-th row and keeps its own sum of dγ (and dβ) in registers; at the end it writes that sum as
one float32 row of [P, width]. Adding up these rows is a W job: ``reduce_partials`` does it later, for the rows of any
number of micro-batches at once, always in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pipex.errors import InputError
from pipex.triton_kernels.checks import OPERAND_DTYPES, Operand, check
from pipex.triton_kernels.launch import Launch, check_device, upcast
from pipex.triton_kernels.tiles import rounded

# A row stays in the registers of one program; wider ones would spill.
WIDEST = 8192


def norm_gradient_reference(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, layer: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and (where there is one) bias, as autograd makes them."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    shape = (x.shape[1],)
    with torch.enable_grad():
        y = F.layer_norm(x, shape, weight, bias, eps) if layer else F.rms_norm(x, shape, weight, eps)
        return torch.autograd.grad(y, [t for t in (x, weight, bias) if t is not None], dy)


@triton.jit
def norm_gradient_kernel(
    dy,  # [rows, width]
    x,  # [rows, width]
    weight,  # [width]
    dx,  # [rows, width]
    weight_partials,  # [programs, width], float32
    bias_partials,  # the same, or None
    dy_stride,
    x_stride,
    dx_stride,
    rows,
    width,
    eps,
    LAYER: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    gamma = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    d_gamma = tl.zeros((WIDTH,), tl.float32)
    d_beta = tl.zeros((WIDTH,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        x_row = tl.load(x + at * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        dy_row = tl.load(dy + at * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        # The statistics are made anew: the row is here anyway, so it costs no memory traffic and none need be saved.
        if LAYER:
            x_row = tl.where(inside, x_row - tl.sum(x_row, 0) / width, 0.0)
        scale = tl.rsqrt(tl.sum(x_row * x_row, 0) / width + eps)
        x_hat = x_row * scale
        scaled = dy_row * gamma
        dx_row = scaled - x_hat * (tl.sum(scaled * x_hat, 0) / width)
        if LAYER:
            dx_row -= tl.sum(scaled, 0) / width
        tl.store(dx + at * dx_stride + columns, rounded(dx_row * scale, DTYPE, UPCAST), mask=inside)
        d_gamma += dy_row * x_hat
        if bias_partials is not None:
            d_beta += dy_row
    place = tl.cast(program, tl.int64) * width + columns
    tl.store(weight_partials + place, d_gamma, mask=inside)
    if bias_partials is not None:
        tl.store(bias_partials + place, d_beta, mask=inside)


@triton.jit
def reduce_partials_kernel(
    partials,  # [rows, width], float32
    gradient,  # [width]
    rows,
    width,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        addresses = partials + r.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(addresses, mask=(r < rows)[:, None] & inside[None, :], other=0.0)
    new = tl.load(gradient + columns, mask=inside, other=0.0).to(tl.float32) + tl.sum(total, 0)
    tl.store(gradient + columns, rounded(new, DTYPE, UPCAST), mask=inside)


def partial_rows(device: torch.device) -> int:
    """Rows of the partials that one norm's backward writes: one per multiprocessor (under the interpreter 4)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def plan_norm_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor,
    weight_partials: Tensor,
    bias_partials: Tensor | None,
    eps: float,
    *,
    layer: bool,
) -> Launch:
    """The launch for checked operands."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    return Launch(
        kernel=norm_gradient_kernel,
        grid=(weight_partials.shape[0],),
        arguments={
            "dy": dy,
            "x": x,
            "weight": weight,
            "dx": dx,
            "weight_partials": weight_partials,
            "bias_partials": bias_partials,
            "dy_stride": dy.stride(0),
            "x_stride": x.stride(0),
            "dx_stride": dx.stride(0),
            "rows": rows,
            "width": width,
            "eps": eps,
        },
        constants={"LAYER": layer, "DTYPE": _dtype(x), "UPCAST": upcast(x.dtype), "WIDTH": block},
        warps=min(16, max(1, block // 512)),  # 16 elements of a row per thread
        stages=1,
    )


def plan_reduce_partials(partials: Tensor, gradient: Tensor) -> Launch:
    """The launch for checked operands, partials as a matrix."""
    rows, width = partials.shape
    return Launch(
        kernel=reduce_partials_kernel,
        grid=(triton.cdiv(width, 64),),
        arguments={"partials": partials, "gradient": gradient, "rows": rows, "width": width},
        constants={"DTYPE": _dtype(gradient), "UPCAST": upcast(gradient.dtype), "ROWS": 32, "COLUMNS": 64},
        warps=4,
        stages=2,
    )


def rms_norm_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, *, partials: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dX of y = x/√(mean(x²) + eps)·γ, and partial rows of dγ.

    Args:
        dy, x: [T, H]; bfloat16, float16 or float32; H up to 8192.
        weight: γ, [H] of the same dtype, without gaps.
        eps: the forward's; where that had None, ``torch.finfo(x.dtype).eps``.
        partials: [partial_rows(device), H], float32: where to write the partial rows, such as one slice per
            micro-batch of a larger tensor.
        out: [T, H]: where to write dX.

    Returns:
        (dx, partials), for ``reduce_partials``.

    Raises:
        InputError: where a shape, dtype, stride or device does not fit.
    """
    dx, weight_partials, _ = _norm_gradient(dy, x, weight, eps, (partials, None), out, layer=False)
    return dx, weight_partials


def layer_norm_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    partials: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX of y = (x - mean(x))/√(var(x) + eps)·γ + β, and partial rows of dγ and dβ.

    Args and errors as for ``rms_norm_gradient``, with two partials.

    Returns:
        (dx, partials of dγ, partials of dβ).
    """
    dx, weight_partials, bias_partials = _norm_gradient(dy, x, weight, eps, partials or (None, None), out, layer=True)
    assert bias_partials is not None
    return dx, weight_partials, bias_partials


def reduce_partials(partials: Tensor, gradient: Tensor) -> None:
    """gradient += the sum of all partial rows, in their order.

    Args:
        partials: [..., H], float32, without gaps: the rows of one micro-batch, or of several in rising order.
        gradient: [H], bfloat16, float16 or float32, without gaps.

    Raises:
        InputError: where a shape, dtype, stride or device does not fit.
    """
    check(
        [
            Operand("gradient", gradient, (gradient.numel(),), OPERAND_DTYPES),
            Operand("partials", partials, (*partials.shape[:-1], gradient.numel()), (torch.float32,)),
        ]
    )
    check_device(gradient.device)
    if not partials.is_contiguous():
        raise InputError("partials have gaps", got=f"strides {partials.stride()}", needed="contiguous rows")
    if partials.numel():
        plan_reduce_partials(partials.view(-1, partials.shape[-1]), gradient).run(gradient.device)


def _norm_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    partials: tuple[Tensor | None, Tensor | None],
    out: Tensor | None,
    *,
    layer: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if x.dim() != 2 or not 0 < x.shape[1] <= WIDEST:
        raise InputError(
            "x is a matrix of rows to normalize",
            got=tuple(x.shape),
            needed=f"[T, H] with H from 1 to {WIDEST}",
            fix="flatten the leading dimensions; for wider rows use torch's own",
        )
    same, rows = (x.dtype,), partial_rows(x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    made = [x.new_empty(rows, x.shape[1], dtype=torch.float32) if p is None else p for p in partials[: 1 + layer]]
    check(
        [
            Operand("x", x, tuple(x.shape), OPERAND_DTYPES),
            Operand("dy", dy, tuple(x.shape), same),
            Operand("weight", weight, (x.shape[1],), same),
            Operand("out", dx, tuple(x.shape), same),
            *(Operand("partials", p, (rows, x.shape[1]), (torch.float32,)) for p in made),
        ]
    )
    check_device(x.device)
    if not all(p.is_contiguous() for p in made):
        raise InputError("partials have gaps", got=f"strides {made[0].stride()}", needed="contiguous rows")
    bias_partials = made[1] if layer else None
    plan_norm_gradient(dy, x, weight, dx, made[0], bias_partials, eps, layer=layer).run(x.device)
    return dx, made[0], bias_partials


def _dtype(tensor: Tensor) -> Any:
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))
