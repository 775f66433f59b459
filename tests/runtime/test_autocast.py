"""Steps under autocast, beside a plain loop with the forward and the loss under it, and the backward outside."""

from __future__ import annotations

from collections.abc import Iterable

import host_world
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipex

SIZE = 6
Found = tuple[list[float], dict[str, list[float]]]


def cast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class Float32(nn.Module):
    """A part that is kept out of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(x.float() @ self.linear.weight + self.linear.bias)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), Float32(), nn.Linear(SIZE, SIZE), Float32())


def optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), lr=0.1)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, SIZE, generator=generator), torch.randn(6, SIZE, generator=generator)


def plain() -> Found:
    stages = model()
    update, losses = optimizer(stages.parameters()), []
    for step in range(3):
        with torch.no_grad(), cast():
            x, y = batch(9)
            losses.append(sum(float(F.mse_loss(stages(a), b) / 3) for a, b in zip(x.split(2), y.split(2), strict=True)))
        total = torch.zeros(())
        for x, y in zip(*(t.split(2) for t in batch(step)), strict=True):
            with cast():
                loss = F.mse_loss(stages(x), y) * (2 / 6)
            loss.backward()
            total = total + loss.detach()
        losses.append(total.item())
        update.step()
        update.zero_grad()
    return losses, {name: p.flatten().tolist() for name, p in stages.named_parameters()}


def train(family: str, chunks: int, once: bool) -> Found:
    plan = pipex.build(family, pipex.current_world().ranks, 3, chunks=chunks)
    pipe = pipex.Pipeline(pipex.split_model(model(), plan.placement.stages), plan, F.mse_loss, optimizer=optimizer)
    losses = []
    with torch.autocast("cpu", torch.bfloat16, enabled=once):
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                losses += [pipe.evaluate(*batch(9)), pipe.step(*batch(step))]
    return losses, {name: p.flatten().tolist() for stage in pipe.local_stages for name, p in stage.names.items()}


@pytest.mark.parametrize("once", [False, True], ids=["on for each step", "on for all steps"])
@pytest.mark.parametrize(
    ("family", "ranks", "chunks"), [("1f1b", 2, 1), ("zb-h1", 2, 1), ("zb-h2", 2, 1), ("looped-bfs", 1, 2)]
)
def test_autocast_is_for_the_forward_and_the_loss(family: str, ranks: int, chunks: int, once: bool) -> None:
    losses, parameters = plain()
    found = host_world.launch(train, ranks, args=(family, chunks, once))
    assert {name: p for _, tensors in found for name, p in tensors.items()} == parameters
    for its, _ in found:
        assert its[1::2] == losses[1::2]
        assert its[::2] == pytest.approx(losses[::2], rel=1e-6)  # a sum in Python
