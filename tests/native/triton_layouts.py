"""Compiles small kernels with whatever Triton runs this (no GPU needed), and says what a launcher must know of them.

Every kind of parameter, in orders that make gaps between them. As a program it prints this for `triton_layouts.jsonl`:
    for venv in TRITON_3.6 TRITON_3.9: VENV/bin/python tests/native/triton_layouts.py
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def scalars(out, small, x, big, scale, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * scale + small + big.to(tl.float32), mask=at < n)


@triton.jit
def mixed(count, x, bias, dy, out, stride, scale, slab, vector, M: tl.constexpr, N: tl.constexpr):
    product = tl.dot(x.load([0, count]), dy.load([count, 0]))
    product += slab.load([count, 0, 0]).reshape(M, N) + vector.load([count])[None, :]
    rows = tl.arange(0, M)[:, None]
    columns = tl.arange(0, N)[None, :]
    tl.store(out + rows * stride + columns, product * scale + tl.load(bias + columns))


@triton.jit
def pairs(operands, out, n):
    total = tl.zeros((64, 64), tl.float32)
    for i in tl.static_range(len(operands)):
        x, dy = operands[i]
        total += tl.dot(x.load([0, n]), dy.load([n, 0]))
    out.store([0, 0], total)


BF16, FP16, FP32 = (f"tensordesc<{kind}[64,64]>" for kind in ("bf16", "fp16", "fp32"))
CASES: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
    (
        scalars,
        {"out": "*fp32", "small": "i32", "x": "*fp32", "big": "i64", "scale": "fp32", "n": "i32", "BLOCK": "constexpr"},
        {"BLOCK": 128},
    ),
    (
        mixed,
        {
            "count": "i32", "x": BF16, "bias": "*fp32", "dy": BF16, "out": "*fp32", "stride": "i64", "scale": "fp32",
            "slab": "tensordesc<fp32[1,64,64]>", "vector": "tensordesc<fp32[64]>", "M": "constexpr", "N": "constexpr",
        },
        {"M": 64, "N": 64},
    ),
    (pairs, {"operands": ((FP16, FP16), (FP16, FP16)), "out": FP32, "n": "i32"}, {}),
]  # fmt: skip


def compiled() -> list[Any]:
    """The kernels as `triton.compile` returns them, for sm_90."""
    results = []
    for kernel, signature, constants in CASES:
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, places, {})
        results.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}))
    return results


def facts(kernel: Any) -> dict[str, Any]:
    metadata = kernel.metadata
    return {
        "triton": triton.__version__,
        "name": metadata.name,
        "signature": kernel.src.signature,
        "tensordesc_meta": metadata.tensordesc_meta,
        "ptx": re.findall(r"^\s*(\.param .*?),?$", kernel.asm["ptx"].partition(".entry")[2].partition("{")[0], re.M),
    }


if __name__ == "__main__":
    for kernel in compiled():
        print(json.dumps(facts(kernel)))
