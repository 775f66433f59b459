"""The split backward of one stage, beside torch's split and beside one whole backward.

    pipex   a prepared forward, then I and W (pipex.backward)
    torch   stage_backward_input and stage_backward_weight of torch.distributed.pipelining
    whole   a plain forward and torch.autograd.backward: what a split must not cost more than

A sample is the time of the backward alone, I and W together, as the mean of ``Case.repeats`` in a row; every provider
runs its own forward before each. ``over_whole`` is the row's median over that of ``whole``. Gradients are compared with
those of ``whole`` first: pipex's must be equal bit by bit, torch's within ``TOLERANCE``.

``forward_us`` is the median of ``FORWARDS`` forwards per sample, for which the providers take turns one by one, since
what a prepared forward adds is little beside the noise of a busy machine. ``forward_over_whole`` is it over that of
``whole``; torch's forward is a plain one as well, so its figure shows how much noise is left.

``held_share`` is what waits for W, over what waited for the backward: the bytes that are alive between I and W, when
whoever called I has let go of the stage's input, its output and both their gradients; divided by the bytes that are
alive after a plain forward, which are its input and what autograd has saved. Parameters and their gradients count in
neither.
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
from pipex.bench.held import Storages
from pipex.bench.report import Row
from pipex.cli.train.model import Block, ModelConfig

PROVIDER, PEER, WHOLE = "pipex", "torch", "whole"
TOLERANCE = 1e-5
"""Largest error of torch's gradients, relative to the tensor's largest element."""

FORWARDS = 10
"""Per sample."""


@dataclass(frozen=True)
class Case:
    """A stage and the shape of its input."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    repeats: int = 10
    """In a row, as a step has them; a single short one after another provider's would measure cold caches."""


def _blocks(count: int, width: int = 64, heads: int = 4) -> nn.Module:
    config = ModelConfig(width, heads, layers=count, context=128)
    return nn.Sequential(*(Block(config) for _ in range(count)))


def _mlp() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())))


CASES = {
    case.name: case
    for case in (
        Case("mlp", _mlp, (32, 64)),
        Case("block", lambda: _blocks(1), (2, 16, 64)),
        Case("blocks32", lambda: _blocks(32), (2, 16, 64)),
        Case("block512", lambda: _blocks(1, width=512, heads=8), (2, 128, 512), repeats=2),
    )
}


def measure(cases: list[Case], rounds: Rounds) -> list[Row]:
    """Three rows per case, with the figures forward_us, over_whole, forward_over_whole and held_share.

    ``whole`` has no held_share: nothing waits there.
    """
    return [row for case in cases for row in _measure_case(case, rounds)]


def _measure_case(case: Case, rounds: Rounds) -> list[Row]:
    torch.manual_seed(0)
    module = case.build()
    x, dy = torch.randn(case.shape), torch.randn(case.shape)
    sides = {
        name: _Side(module, x, dy, provider, case.repeats)
        for name, provider in ((WHOLE, _Whole), (PROVIDER, _Pipex), (PEER, _Torch))
    }
    wanted = sides[WHOLE].gradients()
    correct = {
        name: all(
            torch.equal(g, w) if name != PEER else float((g - w).abs().max()) <= TOLERANCE * float(w.abs().max())
            for g, w in zip(side.gradients(), wanted, strict=True)
        )
        for name, side in sides.items()
    }
    held = {name: side.held() for name, side in sides.items()}
    times = {name: quantiles(s) for name, s in rounds.interleave({n: s.sample for n, s in sides.items()}).items()}
    forward_rounds = Rounds(FORWARDS * rounds.samples, rounds.warmups)
    forwards = forward_rounds.interleave({name: side.forward for name, side in sides.items()})
    forward_us = {name: quantiles(samples).p50 for name, samples in forwards.items()}
    return [
        Row(
            case.name, name, {"shape": case.shape}, time, times[PEER].p50 / time.p50, correct[name],
            {"forward_us": forward_us[name], "over_whole": time.p50 / times[WHOLE].p50,
             "forward_over_whole": forward_us[name] / forward_us[WHOLE],
             "held_share": None if name == WHOLE else held[name].between / held[WHOLE].after_forward},
        )
        for name, time in times.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class Held:
    """Bytes alive at three times of one micro-batch."""

    after_forward: int
    between: int  # I and W
    after: int


class _Side:
    """One provider on its own copy of the stage."""

    def __init__(self, module: nn.Module, x: Tensor, dy: Tensor, provider: Any, repeats: int) -> None:
        self._module = copy.deepcopy(module)
        self._x, self._dy, self._repeats = x, dy, repeats
        self._provider = provider(self._module)

    def sample(self) -> float:
        """Microseconds of one backward: the mean over the repeats."""
        return sum(self.run() for _ in range(self._repeats)) / self._repeats

    def forward(self) -> float:
        """Microseconds of one forward."""
        x = self._x.clone().requires_grad_()
        begin = perf_counter()
        y = self._provider.forward(x)
        end = perf_counter()
        del y  # its graph is let go here, not within the time
        return 1e6 * (end - begin)

    def run(self) -> float:
        """Microseconds of one backward; gradients are added to those of the runs before."""
        x = self._x.clone().requires_grad_()
        y = self._provider.forward(x)
        begin = perf_counter()
        self._provider.backward_input(y, self._dy, x)
        self._provider.backward_weight()
        return 1e6 * (perf_counter() - begin)

    def gradients(self) -> list[Tensor]:
        """Of one backward."""
        self._module.zero_grad()
        self.run()
        return [p.grad.clone() for p in self._module.parameters() if p.grad is not None]

    def held(self) -> Held:
        """Of one micro-batch."""
        parameters = list(self._module.parameters())
        with Storages() as storages:
            x = self._x.clone().requires_grad_()
            graph = self._provider.forward(x).grad_fn  # without the output, which goes to the next stage
            after_forward = storages.alive(parameters)
            del graph
            y = self._provider.forward(x)
            self._provider.backward_input(y, self._dy.clone(), x)
            x.grad = None  # a caller that has sent it may do so
            del x, y
            between = storages.alive(parameters)
            self._provider.backward_weight()
            return Held(after_forward, between, storages.alive(parameters))


class _Whole:
    def __init__(self, module: nn.Module) -> None:
        self.forward = module

    def backward_input(self, y: Tensor, dy: Tensor, x: Tensor) -> None:
        torch.autograd.backward([y], [dy])

    def backward_weight(self) -> None:
        """Nothing is left to do."""


class _Pipex:
    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._splitter = Splitter.of(module)

    def forward(self, x: Tensor) -> Tensor:
        with self._splitter.record() as self._tape:
            output: Tensor = self._module(x)
        return output

    def backward_input(self, y: Tensor, dy: Tensor, x: Tensor) -> None:
        self._tape.backward_input([y], [dy], [x])

    def backward_weight(self) -> None:
        self._tape.backward_weight()


class _Torch:
    def __init__(self, module: nn.Module) -> None:
        self.forward = module

    def backward_input(self, y: Tensor, dy: Tensor, x: Tensor) -> None:
        _, self._groups = stage_backward_input([y], [dy], [x], self.forward.parameters())

    def backward_weight(self) -> None:
        stage_backward_weight(self.forward.parameters(), self._groups)
