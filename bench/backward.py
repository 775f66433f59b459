"""The split backward of one stage, beside torch's split and beside one whole backward.

    pipex   a prepared forward, then I and W (pipex.backward)
    torch   stage_backward_input and stage_backward_weight of torch.distributed.pipelining
    whole   torch.autograd.backward: what a split must not cost more than

A sample is the time of the backward alone, I and W together, as the mean of ``REPEATS`` in a row; every provider runs
its own forward before each, which is given as ``forward_us``. ``over_whole`` is the row's median over that of
``whole``. Gradients are compared with those of ``whole`` first: pipex's must be equal bit by bit, torch's within
``TOLERANCE``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from pipex.backward import Splitter
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.report import Row
from pipex.cli.train.model import Block, ModelConfig

PROVIDER, PEER, WHOLE = "pipex", "torch", "whole"
TOLERANCE = 1e-5
"""Largest error of torch's gradients, relative to the tensor's largest element."""


REPEATS = 10
"""In a row, as a step has them; a single one after another provider's would measure cold caches."""


@dataclass(frozen=True)
class Case:
    """A stage and the shape of its input."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _blocks(count: int) -> nn.Module:
    config = ModelConfig(width=64, heads=4, layers=count, context=16)
    return nn.Sequential(*(Block(config) for _ in range(count)))


def _mlp() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())))


CASES = {
    case.name: case
    for case in (
        Case("mlp", _mlp, (32, 64)),
        Case("block", lambda: _blocks(1), (2, 16, 64)),
        Case("blocks32", lambda: _blocks(32), (2, 16, 64)),
    )
}


def measure(cases: list[Case], rounds: Rounds) -> list[Row]:
    """Three rows per case, with the figures forward_us and over_whole."""
    return [row for case in cases for row in _measure_case(case, rounds)]


def _measure_case(case: Case, rounds: Rounds) -> list[Row]:
    torch.manual_seed(0)
    module = case.build()
    x, dy = torch.randn(case.shape), torch.randn(case.shape)
    sides = {
        WHOLE: _Side(module, x, dy, _Whole),
        PROVIDER: _Side(module, x, dy, _Pipex),
        PEER: _Side(module, x, dy, _Torch),
    }
    wanted = sides[WHOLE].gradients()
    correct = {
        name: all(
            torch.equal(g, w) if name != PEER else float((g - w).abs().max()) <= TOLERANCE * float(w.abs().max())
            for g, w in zip(side.gradients(), wanted, strict=True)
        )
        for name, side in sides.items()
    }
    times = {name: quantiles(s) for name, s in rounds.interleave({n: s.sample for n, s in sides.items()}).items()}
    return [
        Row(
            case.name, name, {"shape": case.shape}, time, times[PEER].p50 / time.p50, correct[name],
            {"forward_us": quantiles(sides[name].forwards[-rounds.samples :]).p50,
             "over_whole": time.p50 / times[WHOLE].p50},
        )
        for name, time in times.items()
    ]  # fmt: skip


class _Side:
    """One provider on its own copy of the stage."""

    def __init__(self, module: nn.Module, x: Tensor, dy: Tensor, backward: Any) -> None:
        self._module = copy.deepcopy(module)
        self._x, self._dy = x, dy
        self._provider = backward(self._module)
        self.forwards: list[float] = []

    def sample(self) -> float:
        """Microseconds of one backward: the mean over ``REPEATS``."""
        forward, backward = zip(*(self.run() for _ in range(REPEATS)), strict=True)
        self.forwards.append(sum(forward) / REPEATS)
        return float(sum(backward)) / REPEATS

    def run(self) -> tuple[float, float]:
        """Microseconds of one forward and its backward; gradients are added to those of the runs before."""
        x = self._x.clone().requires_grad_()
        begin = perf_counter()
        y = self._provider.forward(x)
        middle = perf_counter()
        self._provider.backward(y, self._dy, x)
        end = perf_counter()
        return 1e6 * (middle - begin), 1e6 * (end - middle)

    def gradients(self) -> list[Tensor]:
        """Of one backward."""
        self._module.zero_grad()
        self.run()
        return [p.grad.clone() for p in self._module.parameters() if p.grad is not None]


class _Whole:
    def __init__(self, module: nn.Module) -> None:
        self.forward = module

    def backward(self, y: Tensor, dy: Tensor, x: Tensor) -> None:
        torch.autograd.backward([y], [dy])


class _Pipex:
    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._splitter = Splitter(module.parameters())

    def forward(self, x: Tensor) -> Tensor:
        with self._splitter.record() as self._tape:
            output: Tensor = self._module(x)
        return output

    def backward(self, y: Tensor, dy: Tensor, x: Tensor) -> None:
        self._tape.backward_input([y], [dy], [x])
        self._tape.backward_weight()


class _Torch:
    def __init__(self, module: nn.Module) -> None:
        self.forward = module

    def backward(self, y: Tensor, dy: Tensor, x: Tensor) -> None:
        _, groups = stage_backward_input([y], [dy], [x], self.forward.parameters())
        stage_backward_weight(self.forward.parameters(), groups)
