"""A forward of a model whose parameters have no values, to see in which order it calls what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipex.partition.allocator import given_back
from pipex.torch_internals import parameters_of


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """In here parameters on the meta device are others on the CPU, of random numbers that repeat, and are the same in
    all of a form, and so take almost no memory."""
    changed: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    values: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in parameters_of(module).items():
            if parameter is not None and not nn.parameter.is_lazy(parameter) and parameter.is_meta:
                changed.append((module, name, parameter))
                if id(parameter) not in made:
                    form = parameter.shape, parameter.dtype
                    if form not in values:
                        values[form] = _repeated(*form, generator)
                    made[id(parameter)] = nn.Parameter(values[form], parameter.requires_grad)
    try:
        for module, name, parameter in changed:
            parameters_of(module)[name] = made[id(parameter)]
        with given_back():  # products copy what repeats, a matrix at a time
            yield
    finally:
        for module, name, parameter in changed:
            parameters_of(module)[name] = parameter


def _repeated(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One row of a matrix in all of its rows, one expert's matrix for all experts (products of several take no rows
    that are one). Of the size of initial values, so that nothing grows beyond what the dtype has."""
    whole = shape[-1 if len(shape) < 3 else -2 :]
    return (torch.rand(whole, generator=generator) * 0.02).to(dtype).expand(shape)
