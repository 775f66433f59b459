"""``torch.einsum`` of two operands, one of them a weight.

Taken apart as ATen does (aten/src/ATen/native/Linear.cpp): both operands are brought to the order of dimensions

    those of the output, then those that are summed over, A-Z before a-z

and from there to one batched product. What that makes of a weight is made of parameters alone, so it is the product
that is recorded.
"""

from __future__ import annotations

import re
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pipex.backward.operations.matmul import bmm, sides
from pipex.backward.recording import Recorder

torch_einsum = torch.einsum

_PLAIN = re.compile(r"(\.\.\.)?([A-Za-z]*)(\.\.\.)?([A-Za-z]*)")


class Order(NamedTuple):
    """Dimensions of the operands and the result of an equation, in one order; of an ellipsis as negative numbers."""

    left: list[int | str]
    right: list[int | str]
    kept: list[int | str]
    summed: list[int | str]


def einsum(tape: Recorder, equation: str, a: Tensor, b: Tensor) -> Tensor:
    """torch.einsum."""
    order = _order(equation.replace(" ", ""), a.dim(), b.dim())
    if order is None or sides(tape, a, b) == (None, None):
        return torch_einsum(equation, a, b)
    dimensions = order.kept + order.summed
    left, right = _aligned(a, order.left, dimensions), _aligned(b, order.right, dimensions)
    kept = range(len(order.kept))
    summed = range(len(kept), len(dimensions))
    if any((left.shape[i] == 1) != (right.shape[i] == 1) or left.shape[i] != right.shape[i] for i in summed):
        return torch_einsum(equation, a, b)  # something is summed before the product, or does not fit
    summed_by_product = [i for i in summed if left.shape[i] != 1]
    both = [i for i in kept if left.shape[i] != 1 and right.shape[i] != 1]
    if not summed_by_product or any(left.shape[i] != right.shape[i] for i in both):
        return torch_einsum(equation, a, b)
    return _pair(tape, left, right, both, summed_by_product).view(
        [max(left.shape[i], right.shape[i]) if 0 not in (left.shape[i], right.shape[i]) else 0 for i in kept]
    )


def _pair(tape: Recorder, left: Tensor, right: Tensor, both: list[int], summed: list[int]) -> Tensor:
    """The product, summed over dimensions that are of one element then."""
    others = [i for i in range(left.dim()) if i not in both and i not in summed]
    of_left = [i for i in others if left.shape[i] != 1]
    of_right = [i for i in others if left.shape[i] == 1]
    batches, rows = prod(left.shape[i] for i in both), prod(left.shape[i] for i in of_left)
    columns, depth = prod(right.shape[i] for i in of_right), prod(left.shape[i] for i in summed)
    order = both + of_left + summed + of_right
    product = bmm(
        tape,
        left.permute(order).reshape(batches, rows, depth),
        right.permute(both + summed + of_right + of_left).reshape(batches, depth, columns),
    )
    sizes = [left.shape[i] for i in both + of_left] + [1] * len(summed) + [right.shape[i] for i in of_right]
    return product.view(sizes).permute([order.index(i) for i in range(len(order))])


def _aligned(operand: Tensor, labels: list[int | str], dimensions: list[int | str]) -> Tensor:
    missing = [label for label in dimensions if label not in labels]
    for _ in missing:
        operand = operand.unsqueeze(operand.dim())
    places = labels + missing
    return operand.permute([places.index(label) for label in dimensions])


def _order(equation: str, left: int, right: int) -> Order | None:
    """None for what is left to torch: a label twice in one operand, an ellipsis that is summed over, and errors."""
    given, arrow, wanted = equation.partition("->")
    operands = given.split(",")
    if len(operands) != 2:
        return None
    a, b = (_labels(text, dim) for text, dim in zip(operands, (left, right), strict=True))
    if a is None or b is None:
        return None
    every = a + b
    span = -min((label for label in every if isinstance(label, int)), default=0)
    letters = sorted({label for label in every if isinstance(label, str)})
    if arrow:
        kept = _labels(wanted, span + len(wanted.replace("...", "")))
        if kept is None or ("..." not in wanted and span) or not set(kept) <= set(every):
            return None
    else:
        kept = [*range(-span, 0), *(letter for letter in letters if every.count(letter) == 1)]
    return Order(a, b, kept, [letter for letter in letters if letter not in kept])


def _labels(text: str, dimensions: int) -> list[int | str] | None:
    """One per dimension; those of an ellipsis are counted from the last, for they are aligned there."""
    found = _PLAIN.fullmatch(text)
    if found is None or text.count("...") > 1:
        return None
    before, _, after = text.partition("...")
    span = dimensions - len(before) - len(after)
    labels: list[int | str] = [*before, *range(-span, 0), *after]
    fits = span >= 0 if "..." in text else span == 0
    return labels if fits and len(set(labels)) == len(labels) else None
