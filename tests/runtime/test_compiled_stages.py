"""Pipelines of compiled stages: the bits of one process whose stages are compiled, and weight gradients in W."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiled_stages import WIDTH, Block, Together
from torch import Tensor, nn

import pipex
from pipex.backward.compiled import CompiledUse
from pipex.plan import build
from pipex.runtime.reference import OneProcess

MICROBATCHES = 8

# The compiler looks at it, of what one layer hands to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stages() -> list[nn.Module]:
    torch.manual_seed(5)
    found: list[nn.Module] = [Together(Block(), Block()), nn.Sequential(Block(), nn.Linear(WIDTH, WIDTH))]
    found[0].compile(backend="aot_eager")
    next(found[1].children()).compile(backend="aot_eager")
    return found


def batch(step: int) -> Tensor:
    return torch.randn(2 * MICROBATCHES, WIDTH, generator=torch.Generator().manual_seed(step))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(("family", "split"), [("v-half", 3), ("v-min", 16)])
def test_the_bits_are_one_process_s(family: str, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of micro-batches that are split and of others."""
    deferred = []
    add_to = CompiledUse.add_to

    def noting(self: CompiledUse, *args: Any) -> None:
        deferred.append(self)
        add_to(self, *args)

    monkeypatch.setattr(CompiledUse, "add_to", noting)
    loss = nn.functional.mse_loss
    pipe = pipex.Pipeline(stages(), build(family, 1, MICROBATCHES), loss, optimizer=sgd, clip_norm=0.5)
    process = OneProcess(stages(), MICROBATCHES, loss, optimizer=sgd, clip_norm=0.5)
    for step in range(3):
        deferred.clear()
        assert pipe.step(batch(step), batch(step + 1)) == process.step(batch(step), batch(step + 1))
        assert len(deferred) == split
    for stage, wanted in zip(pipe.local_stages, process.stages, strict=True):
        for one, other in zip(stage.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(one, other)
