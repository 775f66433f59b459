"""A small pipeline, and the loop of plain torch that it must equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pipex

LOSS = nn.functional.mse_loss
MICROBATCHES = 3


def layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def data(step: int, samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(samples, 6, generator=generator), torch.randn(samples, 3, generator=generator)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def pipeline(
    family: str = "zb-h1", model: Callable[[], nn.Module] = layers, loss: Any = LOSS, **options: Any
) -> pipex.Pipeline:
    ranks = pipex.current_world().ranks
    plan = pipex.build(family, ranks, MICROBATCHES)
    return pipex.Pipeline(pipex.split_model(model(), ranks), plan, loss, **{"optimizer": adam, **options})


def micro_batches(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(torch.tensor_split(t, MICROBATCHES) for t in batch), strict=True))


def backward(model: nn.Module, batch: tuple[Tensor, Tensor], loss: Any = LOSS) -> float:
    """Plain torch: adds the gradients of the mean over the batch; returns the mean."""
    total = torch.zeros(())
    for x, y in micro_batches(batch):
        part = loss(model(x), y) * (len(x) / len(batch[0]))
        part.backward()
        total = total + part.detach()
    return total.item()


Found = tuple[list[Any], dict[str, Tensor]]


def parameters_of(pipe: pipex.Pipeline) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for stage in pipe.local_stages for name, tensor in stage.names.items()}


def assert_same(found: Sequence[Found], expected: Found) -> None:
    """Every rank has the expected values, and together they have all parameters, bit for bit."""
    values, parameters = expected
    seen = set()
    for theirs, held in found:
        assert theirs == values
        seen |= held.keys()
        for name, tensor in held.items():
            assert torch.equal(tensor, parameters[name]), name
    assert seen == parameters.keys()


def plain(model: nn.Module, values: list[Any]) -> Found:
    return values, {name: parameter.detach() for name, parameter in model.named_parameters()}
