"""The kernels as they are shipped, one of each kind: what tests gate and ``pipex bench gemm --compile-only`` prints.

Each is planned by the function that plans it at run time, from tensors without memory, so that the gates see what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipex.triton_kernels.input_gradient import plan_input_gradient
from pipex.triton_kernels.launch import Launch
from pipex.triton_kernels.norm import WIDEST, plan_norm_gradient, plan_reduce_partials
from pipex.triton_kernels.weight_gradient import plan_slabs, plan_table

# Sizes do not change what is compiled, only whether they are multiples of 16 does.
ALIGNED, ODD = 4096, 4095

Capability = tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """A name, and the launch for a GPU of some compute capability.

    Attributes:
        name: its operation and what is special about it.
        launch: plans it for a compute capability.
        matrix: whether it multiplies matrices.
        aligned: whether its operands are such that Hopper copies them by descriptors.
        capabilities: where it is used.
    """

    name: str
    launch: Callable[[Capability], Launch]
    matrix: bool = True
    aligned: bool = True
    capabilities: tuple[int, ...] = (90, 80)


def variants() -> list[Variant]:
    """All of them."""
    activations = (None, "relu", "silu", "gelu", "gelu_tanh", "swiglu")
    return [
        *(Variant(f"input gradient, {name or 'plain'}", _input_gradient(name)) for name in activations),
        Variant("input gradient, gelu, float16", _input_gradient("gelu", torch.float16)),
        Variant("input gradient, swiglu, unaligned", _input_gradient("swiglu", size=ODD), aligned=False),
        Variant("input gradient, gelu, float32", _input_gradient("gelu", torch.float32), False, False),
        Variant("weight gradient, slab", _weight_gradient(1, 4, False)),
        Variant("weight gradient, slab, bias", _weight_gradient(1, 4, True)),
        Variant("weight gradient, slab, bias, exact", _weight_gradient(1, 4, True, exact=True), capabilities=(90,)),
        Variant("weight gradient, slab, bias, bfloat16 gradient", _weight_gradient(1, 4, True, torch.bfloat16)),
        # Each slab repeats the loop: more of them cost compile time, not registers.
        Variant("weight gradient, 2 slabs, bias", _weight_gradient(2, 1, True)),
        Variant("weight gradient, table, bias", _weight_gradient(0, 12, True)),
        Variant("weight gradient, slab, bias, unaligned", _weight_gradient(1, 4, True, size=ODD), aligned=False),
        Variant(
            "weight gradient, slab, bias, float32", _weight_gradient(1, 4, True, dtype=torch.float32), False, False
        ),
        Variant("RMSNorm gradient", _norm(False), matrix=False),
        Variant("LayerNorm gradient", _norm(True), matrix=False),
        Variant("LayerNorm gradient, unaligned", _norm(True, size=ODD), matrix=False),
        Variant("partial rows", _partials, matrix=False),
    ]


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _input_gradient(
    activation: str | None, dtype: torch.dtype = torch.bfloat16, size: int = ALIGNED
) -> Callable[[Capability], Launch]:
    square = _empty(size, size, dtype=dtype)
    saved = {None: 0, "swiglu": 2}.get(activation, 1)

    def plan(capability: Capability) -> Launch:
        return plan_input_gradient(square, square, activation, (square,) * saved, (square,) * max(1, saved), capability)

    return plan


def _weight_gradient(
    slabs: int,
    micro_batches: int,
    bias: bool,
    gradient: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.bfloat16,
    size: int = ALIGNED,
    exact: bool = False,
) -> Callable[[Capability], Launch]:
    """With ``slabs`` of so many micro-batches; without, a table of them."""
    slab = _empty(micro_batches, size, size, dtype=dtype)
    weight_grad = _empty(size, size, dtype=gradient)

    def plan(capability: Capability) -> Launch:
        if slabs:
            bias_grad = weight_grad[0] if bias else None
            return plan_slabs([(slab, slab)] * slabs, weight_grad, bias_grad, exact, capability)
        table = _empty(4, 2 + 3 * micro_batches, dtype=torch.int64)
        return plan_table(table, slab[0], slab[0], weight_grad, bias, capability)

    return plan


def _norm(layer: bool, size: int = WIDEST) -> Callable[[Capability], Launch]:
    x, partials = _empty(ALIGNED, size), _empty(132, size, dtype=torch.float32)

    def plan(_: Capability) -> Launch:
        return plan_norm_gradient(x, x, x[0], x, partials, partials if layer else None, 1e-5, layer=layer)

    return plan


def _partials(_: Capability) -> Launch:
    partials = _empty(4 * 132, ALIGNED, dtype=torch.float32)
    return plan_reduce_partials(partials, partials[0])
