"""What a rank does in tests whose ranks are started afresh, and so import it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pipex
from pipex.errors import PeerLost
from pipex.observe import Recorder
from pipex.plan import Plan
from pipex.plan.memory import with_promise

WIDTH = 64


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(8)]
    return nn.Sequential(*blocks)


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(24, WIDTH, generator=generator), torch.randn(24, WIDTH, generator=generator)


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def plan_of(family: str, ranks: int) -> Plan:
    """``"gpipe offloaded"``: with all stages offloaded."""
    name, *spared = family.split()
    plan = pipex.build(name, ranks, 6)
    every = tuple(range(plan.placement.stages))
    return with_promise(dataclasses.replace(plan, **dict.fromkeys(spared, every))) if spared else plan


def pipeline(family: str, ranks: int, exact: bool | None, observer: Recorder | None = None) -> pipex.Pipeline:
    plan = plan_of(family, ranks)
    return pipex.Pipeline(
        pipex.split_model(layers(), plan), plan, nn.functional.mse_loss, optimizer=optimizer,
        clip_norm=None if plan.asynchronous else 1.0, exact=exact, observer=observer,
    )  # fmt: skip


def train(jobs: Sequence[tuple[str, bool | None]]) -> list[dict[str, Any]]:
    """Trains a pipeline for each (family, exact), one after the other in one run."""
    world = pipex.current_world()
    answers = []
    for family, exact in jobs:
        recorder = Recorder(10)
        pipe = pipeline(family, world.ranks, exact, recorder)
        losses = [pipe.step(*data(step)).hex() for step in range(5)]
        pipe.close()
        waits = [event.end - event.begin for event in recorder.events if event.kind.startswith("RECV")]
        staged = getattr(world, "staged", None)
        answers.append({"losses": losses, "device": str(world.device), "staged": staged, "waits": waits})
    return answers


def train_until_one_is_killed(notes: str) -> None:
    """Rank 1 kills itself in the third step; the others write down what they were told and whether their GPU works."""
    world = pipex.current_world()
    pipe = pipex.Pipeline(
        pipex.split_model(layers(), world.ranks), pipex.build("1f1b", world.ranks, 6), nn.functional.mse_loss,
        optimizer=optimizer,
    )  # fmt: skip
    for step in range(2):
        pipe.step(*data(step))
    if world.rank == 1:
        threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGKILL)).start()
    before = time.monotonic()
    try:
        while True:
            pipe.step(*data(0))
    except PeerLost as error:
        works = float(torch.ones(1000, device=world.device).sum()) == 1000
        note = {"error": str(error), "rank": error.rank, "seconds": time.monotonic() - before, "works": works}
        Path(notes, str(world.rank)).write_text(json.dumps(note))
        raise
