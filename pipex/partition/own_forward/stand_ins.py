"""A forward of a model whose parameters have no values, to see in which order it calls what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipex.torch_internals import parameters_of


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """In here parameters on the meta device are others on the CPU, of random numbers that repeat, and so take almost no
    memory."""
    changed: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in parameters_of(module).items():
            if parameter is not None and not nn.parameter.is_lazy(parameter) and parameter.is_meta:
                changed.append((module, name, parameter))
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_repeated(parameter, generator), parameter.requires_grad)
    try:
        for module, name, parameter in changed:
            parameters_of(module)[name] = made[id(parameter)]
        yield
    finally:
        for module, name, parameter in changed:
            parameters_of(module)[name] = parameter


def _repeated(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """One row of a matrix in all of its rows, one expert's matrix for all experts (products of several take no rows
    that are one). Of the size of initial values, so that nothing grows beyond what the dtype has."""
    whole = tensor.shape[-1 if tensor.dim() < 3 else -2 :]
    return (torch.rand(whole, generator=generator) * 0.02).to(tensor.dtype).expand(tensor.shape)
