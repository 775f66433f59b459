"""Which matrix products of the backward are measured, by ``pipex bench gemm`` and by ``pipex tune``. Imports no torch,
so that their help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from pipex.errors import InputError

ACTIVATIONS = {"dX": None, "dX+relu": "relu", "dX+silu": "silu", "dX+gelu": "gelu", "dX+gelu_tanh": "gelu_tanh",
               "dX+swiglu": "swiglu"}  # fmt: skip
WEIGHTS = ("dW", "dW+db")
KINDS = (*ACTIVATIONS, *WEIGHTS)
LAYERS = {"square": (1, 1), "up": (4, 1), "down": (1, 4)}
"""[N, K] in units of the hidden width."""
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an element."""


@dataclass(frozen=True)
class Case:
    """One product: of dY [T, N] and W [N, K], or of n dYᵀ [N, T] and X [T, K]."""

    kind: str
    tokens: int
    n: int
    k: int
    micro_batches: int
    dtype: str
    gradient_dtype: str

    @property
    def name(self) -> str:
        """Such as ``dX+gelu/4096x16384/512`` (kind, N x K, T) or ``dW/4096x4096/512x8`` (n micro-batches)."""
        batches = f"x{self.micro_batches}" if self.kind in WEIGHTS else ""
        return f"{self.kind}/{self.n}x{self.k}/{self.tokens}{batches}"

    @property
    def flop(self) -> int:
        return 2 * self.tokens * self.n * self.k * self.micro_batches

    @property
    def nbytes(self) -> int:
        """Each operand read and each result written once."""
        tokens = self.tokens * self.micro_batches
        if self.kind in WEIGHTS:
            gradient = 2 * self.n * (self.k + (self.kind == "dW+db")) * DTYPES[self.gradient_dtype]
            return tokens * (self.n + self.k) * DTYPES[self.dtype] + gradient
        maps = {"dX": 1, "dX+swiglu": 4}.get(self.kind, 2)  # of [T, K]: read for the activation, and written
        return (tokens * (self.n + maps * self.k) + self.n * self.k) * DTYPES[self.dtype]


def cases(
    kinds: Sequence[str],
    layers: Sequence[str],
    hidden: Sequence[int],
    tokens: Sequence[int],
    micro_batches: Sequence[int],
    dtype: str,
    gradient: str,
) -> list[Case]:
    """All combinations. An activation stands before a ``down`` projection, so these kinds have that layer only.

    Raises:
        InputError: an unknown name, or a size below 1.
    """
    for given, known in ((kinds, KINDS), (layers, LAYERS), ([dtype], DTYPES), ([gradient], DTYPES)):
        for name in given:
            if name not in known:
                raise InputError("an unknown choice", got=repr(name), needed=f"one of {', '.join(known)}")
    if min(*hidden, *tokens, *micro_batches) < 1:
        raise InputError("a size is below 1", got=f"{hidden}, {tokens}, {micro_batches}", needed="1 or more")
    if gradient not in ("float32", dtype):
        raise InputError("no such gradient", got=gradient, needed=f"float32 or the operands' {dtype}")
    found = []
    for kind in kinds:
        for layer in layers if kind in ("dX", *WEIGHTS) else ("down",):
            for width in hidden:
                n, k = (factor * width for factor in LAYERS[layer])
                for t in tokens:
                    for count in micro_batches if kind in WEIGHTS else (1,):
                        found.append(Case(kind, t, n, k, count, dtype, gradient))
    return list(dict.fromkeys(found))


def add_products(parser: argparse.ArgumentParser) -> None:
    """Declares which products are measured."""
    parser.add_argument("--kinds", metavar="KIND,...", default="dX,dX+gelu,dX+swiglu,dW,dW+db",
                        help="of dX, dX+relu, dX+silu, dX+gelu, dX+gelu_tanh, dX+swiglu, dW and dW+db "
                        "(default: dX,dX+gelu,dX+swiglu,dW,dW+db)")  # fmt: skip
    parser.add_argument("--layers", metavar="LAYER,...", default="square,up",
                        help="of square (H x H), up (4H x H) and down (H x 4H); activations stand before a down "
                        "(default: square,up)")  # fmt: skip
    parser.add_argument("--hidden", metavar="H,...", default="1024,2048,4096,8192",
                        help="hidden widths (default: 1024,2048,4096,8192)")  # fmt: skip
    parser.add_argument("--tokens", metavar="T,...", default="512,2048,8192",
                        help="tokens of a micro-batch (default: 512,2048,8192)")  # fmt: skip
    parser.add_argument("--micro-batches", metavar="COUNT,...", default="1,4,8",
                        help="micro-batches of a weight gradient (default: 1,4,8)")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: bfloat16)")
    parser.add_argument("--gradient", default="float32",
                        help="dtype of the weight gradient: float32 or the operands' (default: float32)")  # fmt: skip


def products_of(options: argparse.Namespace) -> list[Case]:
    """The products that the options choose.

    Raises:
        InputError: as ``cases``, or what should be numbers is none.
    """
    return cases(
        options.kinds.split(","),
        options.layers.split(","),
        _numbers(options.hidden),
        _numbers(options.tokens),
        _numbers(options.micro_batches),
        options.dtype,
        options.gradient,
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("not a list of numbers", got=repr(text), needed="such as 1024,4096") from None
