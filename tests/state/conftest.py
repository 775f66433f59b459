"""Two ranks' checkpoints of different steps, for the tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipex.state.checkpoint import Checkpoint
from pipex.state.save import commit, write_shard


def _tensors_of(step: int, rank: int) -> dict[str, Tensor]:
    """Different bits for every step and rank; two tensors, one of them larger than any write buffer."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {f"large{rank}": torch.randn(50, 1000, generator=generator), f"step{rank}": torch.tensor(float(step))}


def _save(directory: Path, step: int, ranks: int = 2) -> None:
    shards = [
        write_shard(directory, step, rank, _tensors_of(step, rank), {f"rank{rank}": step}) for rank in range(ranks)
    ]
    commit(directory, step, shards, {"lr": 0.1 * step})


def _assert_holds(directory: Path, step: int, ranks: int = 2) -> None:
    checkpoint = Checkpoint.open(directory)
    expected = {name: tensor for rank in range(ranks) for name, tensor in _tensors_of(step, rank).items()}
    loaded = checkpoint.load(expected)
    assert checkpoint.step == step
    assert checkpoint.meta == {"lr": 0.1 * step} | {f"rank{rank}": step for rank in range(ranks)}
    assert checkpoint.tensors.keys() == loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.fixture
def tensors_of() -> Callable[..., dict[str, Tensor]]:
    return _tensors_of


@pytest.fixture
def save() -> Callable[..., None]:
    return _save


@pytest.fixture
def assert_holds() -> Callable[..., None]:
    return _assert_holds
