"""What a rank does in tests whose ranks are started afresh, and so import it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pipex
from pipex.observe import Recorder

WIDTH = 64


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(4)]
    return nn.Sequential(*blocks)


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(24, WIDTH, generator=generator), torch.randn(24, WIDTH, generator=generator)


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def train(family: str, ranks: int, exact: bool | None) -> dict[str, Any]:
    world = pipex.current_world()
    recorder = Recorder(10)
    pipe = pipex.Pipeline(
        pipex.split_model(layers(), pipex.build(family, ranks, 6).placement.stages), pipex.build(family, ranks, 6),
        nn.functional.mse_loss, optimizer=optimizer, clip_norm=1.0, exact=exact, observer=recorder,
    )  # fmt: skip
    losses = [pipe.step(*data(step)).hex() for step in range(5)]
    waits = [event.end - event.begin for event in recorder.events if event.kind.startswith("RECV")]
    staged = getattr(world, "staged", None)
    return {"losses": losses, "device": str(world.device), "staged": staged, "waits": waits}
