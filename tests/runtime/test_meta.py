"""A model that is made on the meta device gets memory for a rank's own stages, and values from a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import host_world
import pytest
import resident
import torch
import torch.nn.functional as F
from random_models import digest
from torch import Tensor, nn

import pipex
from pipex.errors import InputError, PipexError

Found = tuple[list[float], dict[str, str | None]]
adam = partial(torch.optim.AdamW, lr=0.05)


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """With a parameter and a module that stand twice, buffers, and a frozen bias."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(
        nn.Linear(4, 4), norm, nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4)
    )
    model[5].weight = model[0].weight
    model[4].bias.requires_grad_(False)
    return model.to(dtype)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
    return x, y


def pipeline(model: nn.Module, dtype: torch.dtype) -> pipex.Pipeline:
    ranks = pipex.current_world().ranks
    plan = pipex.build("zb-h1", ranks, 4)
    short = dtype is torch.bfloat16
    return pipex.Pipeline(pipex.split_model(model, ranks), plan, F.mse_loss, optimizer=adam, main_weights=short)


def go_on(pipe: pipex.Pipeline, dtype: torch.dtype) -> Found:
    losses = [pipe.step(*batch(step, dtype)) for step in range(2, 4)]
    return losses, {name: digest(t.float()) for stage in pipe.local_stages for name, t in stage.names.items()}


def first(directory: str, dtype: torch.dtype) -> Found:
    pipe = pipeline(layers(dtype), dtype)
    for step in range(2):
        pipe.step(*batch(step, dtype))
    pipe.save(directory)
    return go_on(pipe, dtype)


def again(directory: str, dtype: torch.dtype) -> Found:
    with torch.device("meta"):
        model = layers(dtype)
    pipe = pipeline(model, dtype)
    assert pipe.optimizer is not None
    for tensor in (t for stage in pipe.local_stages for t in (*stage.parameters(), *stage.buffers())):
        assert tensor.device.type == "cpu"
    for call in (lambda: pipe.step(*batch(2, dtype)), lambda: pipe.evaluate(*batch(2, dtype)), lambda: pipe.save("x")):
        with pytest.raises(InputError, match=r"the model has no values yet; got .* meta device; needed load"):
            call()
    pipe.load(directory)
    return go_on(pipe, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_goes_on_as_the_model_that_was_saved(tmp_path: Path, ranks: int, dtype: torch.dtype) -> None:
    saved = host_world.launch(first, ranks, args=(str(tmp_path), dtype))
    assert host_world.launch(again, ranks, args=(str(tmp_path), dtype)) == saved


def test_tied_and_shared_tensors_stay_one() -> None:
    with torch.device("meta"):
        model = layers()
    weight = model[0].weight
    pipe = pipex.Pipeline(pipex.split_model(model, 2), pipex.build("looped-bfs", 1, 2, chunks=2), F.mse_loss)
    assert model[5].weight is model[0].weight is not weight
    assert len(list(nn.ModuleList(pipe.local_stages).parameters())) == len(list(layers().parameters()))
    assert not model[4].bias.requires_grad


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) + self.angles


def with_a_table() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Table(), nn.Linear(4, 4))
    pipeline(model, torch.float32)


def test_a_buffer_that_no_checkpoint_holds_is_refused_by_name() -> None:
    with pytest.raises(PipexError, match=r"0\.angles has no values, and is in no checkpoint; .*build_stages"):
        host_world.launch(with_a_table, 2)


def test_memory_grows_by_a_rank_s_own_stages() -> None:
    command = [sys.executable, resident.__file__, "meta"]
    for after, most, whole in json.loads(subprocess.run(command, capture_output=True, check=True).stdout):
        assert whole == 16 * 2048 * 2048 * 4
        assert after <= most <= 1.3
