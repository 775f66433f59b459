"""``torch.einsum`` of two operands, one of them a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from pipex.backward.operations.again import AgainUse
from pipex.backward.operations.matmul import data, lowered
from pipex.backward.recording import Recorder
from pipex.torch_internals import any_autocast

torch_einsum = torch.einsum


def einsum(tape: Recorder, equation: str, a: Tensor, b: Tensor) -> Tensor:
    """torch.einsum."""
    lower = any_autocast()
    left, right = tape.weight(a, lower), tape.weight(b, lower)
    if (left is None) == (right is None):
        return torch_einsum(equation, a, b)
    if right is not None:
        a = data(tape, a)
        use = AgainUse(tape, a, lambda a, b: torch_einsum(equation, a, b), [lowered(a, right)])
        return tape.product(use, torch_einsum, equation, a, right.alias)
    assert left is not None
    b = data(tape, b)
    use = AgainUse(tape, b, lambda b, a: torch_einsum(equation, a, b), [lowered(b, left)])
    return tape.product(use, torch_einsum, equation, left.alias, b)
