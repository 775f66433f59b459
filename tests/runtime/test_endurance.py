"""A long run keeps its size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cases import sampled
from torch import nn

import pipex


def size() -> dict[str, int]:
    return {
        "pages": int(Path("/proc/self/statm").read_text().split()[1]),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def long_run(family: str, steps: int) -> list[dict[str, int]]:
    torch.manual_seed(0)
    ranks = pipex.current_world().ranks
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(8)))
    pipeline = pipex.Pipeline(
        pipex.split_model(model, ranks), pipex.build(family, ranks, 4), nn.functional.mse_loss,
        optimizer=torch.optim.AdamW, clip_norm=1.0,
    )  # fmt: skip
    sizes = []
    for step in range(1, steps + 1):
        x = torch.randn(16, 64)
        pipeline.step(x, x)
        if step in (100, steps):
            sizes.append(size())
    return sizes


@pytest.mark.long
@pytest.mark.parametrize("family", sampled(["1f1b", "zb-h1"], 1, name="endurance"))
def test_memory_descriptors_and_threads_do_not_grow(family: str) -> None:
    for early, late in pipex.launch(long_run, 2, args=(family, 3000)):
        assert late["pages"] < 1.005 * early["pages"]
        assert (late["descriptors"], late["threads"]) == (early["descriptors"], early["threads"])
