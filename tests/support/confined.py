"""Trains a model whose parameters are three times what each of 4 ranks may address beyond what it does at the start.

``python confined.py`` prints each rank's losses, and its own share of the model; the weights are frozen, since a
gradient of each would take as much again.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path

import host_world
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipex

LAYERS, WIDTH, RANKS, STEPS = 32, 2896, 4, 2
NBYTES = LAYERS * WIDTH * WIDTH * 4


def layer(number: int) -> nn.Module:
    made = nn.Linear(WIDTH, WIDTH)
    made.weight.requires_grad_(False)
    return made


def batch() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    return x, y


def confine() -> None:
    """From here on this process may address a third of the model more."""
    addressed = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addressed + NBYTES // 3,) * 2)


def train() -> tuple[list[float], float]:
    world = pipex.current_world()
    confine()
    plan = pipex.build("1f1b", world.ranks, 2)
    torch.manual_seed(0)
    stages = pipex.build_stages(layer, LAYERS, plan, world.rank)
    pipe = pipex.Pipeline(stages, plan, F.mse_loss, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    losses = [pipe.step(*batch()) for _ in range(STEPS)]
    return losses, sum(p.nbytes for stage in pipe.local_stages for p in stage.parameters()) / NBYTES


def too_much() -> str:
    confine()
    try:
        nn.Sequential(*map(layer, range(LAYERS)))
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(json.dumps([host_world.launch(train, RANKS), host_world.launch(too_much, 1)]))
