"""Pipelines with fused pairs, whose layers tell of their forwards and backwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipex
from pipex.plan import Plan
from pipex.runtime import pairs

WIDTH = 8


def core_to_spare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a fixture: around a test, this process has two cores, of which an operation takes one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(pairs, "cores_of", lambda world: 2)
    yield
    torch.set_num_threads(before)


@contextmanager
def cores(of_rank: Callable[[int], int]) -> Iterator[None]:
    """In a rank of its own, by its number."""
    torch.set_num_threads(1)
    before, pairs.cores_of = pairs.cores_of, lambda world: of_rank(world.rank)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 100)
    try:
        yield
    finally:
        pairs.cores_of = before
        sys.setswitchinterval(interval)


class Seen(nn.Module):
    """A linear layer whose forwards and backwards call this."""

    def __init__(self, forward: Callable[[], object] = int, backward: Callable[[Any], object] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self._before, self._behind = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        self._before()
        y = self.linear(x)
        if self._behind is not None:
            y.register_hook(self._behind)
        return y


def one_rank(first: nn.Module, last: nn.Module, plan: Plan | None = None, **options: Any) -> pipex.Pipeline:
    """Of two stages on one rank; without another plan, ``ORDER``."""
    if plan is None:
        plan = pipex.build("dualpipev", 1, 4)
        assert " ".join(map(str, plan.orders[0])) == ORDER
    return pipex.Pipeline([first, last], plan, F.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1), **options)


ORDER = (
    "0F0 1F0 0F1 1B0 (1F1;0B0)OVERLAP_F_B (0F2;1B1)OVERLAP_F_B (1F2;0B1)OVERLAP_F_B (0F3;1B2)OVERLAP_F_B "
    "(1F3;0B2)OVERLAP_F_B 1B3 0I3 0W3"
)


def batch() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    return x, y
