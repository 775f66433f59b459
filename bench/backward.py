"""The split backward of one stage, beside torch's split and beside one whole backward.

    pipex   a prepared forward, then I and W (pipex.backward)
    torch   stage_backward_input and stage_backward_weight of torch.distributed.pipelining
    whole   a plain forward and torch.autograd.backward: what a split must not cost more than

A sample is the time of the backward alone, I and W together, as the mean of ``Case.repeats`` in a row; every provider
runs its own forward before each. ``over_whole`` is the row's median over that of ``whole``. Gradients are compared with
those of ``whole`` first: pipex's must be equal bit by bit, torch's within ``TOLERANCE``. On a GPU the host's time is in
a sample, as it is in a step, and gradients are compared with float64's: pipex's and torch's error may be at most twice
that of ``whole``. Of several micro-batches all I's come first and then all W's.

``forward_us`` is the median of ``FORWARDS`` forwards per sample, for which the providers take turns one by one, since
what a prepared forward adds is little beside the noise of a busy machine. ``forward_over_whole`` is it over that of
``whole``; torch's forward is a plain one as well, so its figure shows how much noise is left.

Regimes: ``fp32`` (bfloat16 on a GPU), the stage as it is; ``autocast``, under bfloat16 autocast; ``checkpointed``, in
one activation checkpoint. Whole steps of pipelines under FSDP2: ``pipex bench drop-in``.

``deferred_share`` is the share of the weight gradients' products (``bench.deferred``) that W makes.

``held_share`` is what waits for W, over what waited for the backward: the bytes that are alive between I and W, when
whoever called I has let go of the stage's input, its output and both their gradients; divided by the bytes that are
alive after a plain forward, which are its input and what autograd has saved (of a checkpointed stage, without the
checkpoint: as much as it makes anew). Parameters and their gradients count in neither.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining.stage import stage_backward_input, stage_backward_weight

from pipex.backward import Splitter, Tape
from pipex.bench import gpu, regimes
from pipex.bench.deferred import Products, Shares
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.environment import environment
from pipex.bench.held import Storages
from pipex.bench.options import add_common, floors_of, rounds_of
from pipex.bench.report import Row, finish
from pipex.models.transformer import Block, ModelConfig

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
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32
    regime: str = "fp32"

    def under(self, regime: str) -> Case:
        """The same in another regime."""
        return self if regime == "fp32" else replace(self, name=f"{self.name}/{regime}", regime=regime)

    @property
    def too_slow(self) -> bool:
        """Whether torch takes minutes for one backward: its split makes a checkpoint anew for every parameter."""
        return self.name == "blocks32/checkpointed"


REGIMES = {
    "fp32": regimes.as_it_is,
    "autocast": regimes.under_autocast,
    "checkpointed": regimes.checkpointed,
}


def _blocks(count: int, width: int = 64, heads: int = 4) -> nn.Module:
    config = ModelConfig(width, heads, layers=count, context=128)
    return nn.Sequential(*(Block(config) for _ in range(count)))


def _mlp() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())))


def _gpu_case(width: int, tokens: int, micro_batches: int) -> Case:
    name = f"block{width}/{tokens}x{micro_batches}"
    shape = (1, tokens, width)
    return Case(name, lambda: _blocks(1, width, width // 128), shape, 2, micro_batches, torch.bfloat16)


CASES = {
    "cpu": (
        Case("mlp", _mlp, (32, 64)),
        Case("block", lambda: _blocks(1), (2, 16, 64)),
        Case("blocks32", lambda: _blocks(32), (2, 16, 64)),
        Case("block512", lambda: _blocks(1, width=512, heads=8), (2, 128, 512), repeats=2),
    ),
    "cuda": tuple(_gpu_case(*sizes) for sizes in ((1024, 1024, 4), (4096, 1024, 4), (4096, 2048, 4), (4096, 4096, 1))),
}
"""By the type of the device."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``pipex bench backward``."""
    parser.description = "The backward of one stage, I and W together: pipex, torch's split, and one whole backward."
    add_common(parser, samples=20, floor="how many times faster than torch's split, such as mlp=2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where; larger stages in bfloat16 on cuda (default: cpu)")  # fmt: skip
    parser.add_argument("--regimes", default="fp32", help=f"of {', '.join(REGIMES)} (default: fp32); a case in another "
                        "one is CASE/REGIME")  # fmt: skip
    parser.add_argument("--min-deferred-share", metavar="CASE=SHARE,...",
                        help="least share of weight gradients that must wait, such as block/autocast=.95")  # fmt: skip
    parser.add_argument("--max-over-whole", metavar="CASE=RATIO,...",
                        help="most that it may cost, in whole backwards, such as block=1.15")  # fmt: skip
    parser.add_argument("--max-forward-over-whole", metavar="CASE=RATIO,...",
                        help="most that the prepared forward may cost, in plain ones, such as block=1.1")  # fmt: skip
    parser.add_argument("--max-held-share", metavar="CASE=SHARE,...",
                        help="most bytes that may wait for W, over a plain forward's, such as block=1")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code."""
    rounds, chosen = rounds_of(options), options.regimes.split(",")
    regimes.check(chosen, list(REGIMES))
    cases = [case.under(regime) for case in CASES[options.device] for regime in chosen]
    cases = [case for case in cases if not case.too_slow]
    floors = floors_of(options, PROVIDER, [case.name for case in cases])
    device, facts = gpu.chosen(options.device, "pipex bench backward")
    torch.set_num_threads(1)
    return finish(environment(1) | facts, measure(cases, rounds, device), floors, as_json=options.json)


def measure(cases: Sequence[Case], rounds: Rounds, device: torch.device) -> list[Row]:
    """Three rows per case, with the figures forward_us, over_whole, forward_over_whole, held_share and deferred_share.

    ``whole`` has none of the last two: nothing waits there.
    """
    return [row for case in cases for row in _measure_case(case, rounds, device)]


def _measure_case(case: Case, rounds: Rounds, device: torch.device) -> list[Row]:
    torch.manual_seed(0)
    module = case.build().to(device, case.dtype)
    x, dy = (torch.randn(case.shape, device=device).to(case.dtype) for _ in range(2))
    sides = {
        name: _Side(module, x, dy, provider, case)
        for name, provider in ((WHOLE, _Whole), (PROVIDER, _Pipex), (PEER, _Torch))
    }
    correct = _correct_on_a_gpu(sides, module, x, dy, case) if device.type == "cuda" else _correct(sides)
    held = {name: side.held() for name, side in sides.items()}
    plain = (
        _Side(module, x, dy, _Whole, replace(case, regime="fp32")) if case.regime == "checkpointed" else sides[WHOLE]
    )
    activations = plain.held().after_forward
    shares = _shares(sides, module, x, dy, case)
    times = {name: quantiles(s) for name, s in rounds.interleave({n: s.sample for n, s in sides.items()}).items()}
    forward_rounds = Rounds(FORWARDS * rounds.samples, rounds.warmups)
    forwards = forward_rounds.interleave({name: side.forward for name, side in sides.items()})
    forward_us = {name: quantiles(samples).p50 for name, samples in forwards.items()}
    return [
        Row(
            case.name, name, {"shape": case.shape}, time, times[PEER].p50 / time.p50, correct[name],
            {"forward_us": forward_us[name], "over_whole": time.p50 / times[WHOLE].p50,
             "forward_over_whole": forward_us[name] / forward_us[WHOLE],
             "held_share": None if name == WHOLE else held[name].between / activations,
             "deferred_share": None if name == WHOLE else shares[name].deferred},
        )
        for name, time in times.items()
    ]  # fmt: skip


def _correct(sides: dict[str, _Side]) -> dict[str, bool]:
    wanted = sides[WHOLE].gradients()
    return {
        name: all(
            torch.equal(g, w) if name != PEER else float((g - w).abs().max()) <= TOLERANCE * float(w.abs().max())
            for g, w in zip(side.gradients(), wanted, strict=True)
        )
        for name, side in sides.items()
    }


def _correct_on_a_gpu(sides: dict[str, _Side], module: nn.Module, x: Tensor, dy: Tensor, case: Case) -> dict[str, bool]:
    exact = copy.deepcopy(module).double()
    for _ in range(case.micro_batches):
        exact(x.double()).backward(dy.double())
    wanted = [_gradient(p) for p in exact.parameters()]
    errors = {
        name: [float((g.double() - w).abs().max()) for g, w in zip(side.gradients(), wanted, strict=True)]
        for name, side in sides.items()
    }
    # A comparison with NaN is false, so no result with one in it passes.
    return {
        name: all(error <= 2 * its_error + 1e-6 for error, its_error in zip(found, errors[WHOLE], strict=True))
        for name, found in errors.items()
    }


def _shares(sides: dict[str, _Side], module: nn.Module, x: Tensor, dy: Tensor, case: Case) -> dict[str, Shares]:
    """Of the providers that split."""
    frozen = _Side(module.requires_grad_(False), x, dy, _Whole, case)
    module.requires_grad_()
    for_inputs, _ = frozen.products()
    whole, _ = sides[WHOLE].products()
    return {name: Shares(for_inputs, whole, *side.products()) for name, side in sides.items() if name != WHOLE}


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@dataclass(frozen=True)
class Held:
    """Bytes alive at three times of one micro-batch."""

    after_forward: int
    between: int  # I and W
    after: int


class _Side:
    """One provider on its own copy of the stage."""

    def __init__(self, module: nn.Module, x: Tensor, dy: Tensor, provider: Any, case: Case) -> None:
        self._module = REGIMES[case.regime](copy.deepcopy(module))
        self._x, self._dy, self._case = x, dy, case
        self._provider = provider(self._module)

    def sample(self) -> float:
        """Microseconds of one backward: the mean over the repeats."""
        return sum(self.run() for _ in range(self._case.repeats)) / self._case.repeats

    def forward(self) -> float:
        """Microseconds of one forward."""
        x = self._x.clone().requires_grad_()
        begin = self._now()
        made = self._provider.forward(x)
        end = self._now()
        del made  # its graph is let go here, not within the time
        return 1e6 * (end - begin)

    def run(self) -> float:
        """Microseconds of the backward of all micro-batches; gradients are added to those of the runs before."""
        xs = [self._x.clone().requires_grad_() for _ in range(self._case.micro_batches)]
        made = [self._provider.forward(x) for x in xs]
        begin = self._now()
        rests = [self._provider.backward_input(m, self._dy, x) for m, x in zip(made, xs, strict=True)]
        for number, rest in enumerate(rests, 1):
            self._provider.backward_weight(rest, more=number < len(rests))
        return 1e6 * (self._now() - begin)

    def gradients(self) -> list[Tensor]:
        """Of one run."""
        self._module.zero_grad()
        self.run()
        return [_gradient(p).clone() for p in self._module.parameters()]

    def products(self) -> tuple[int, int]:
        """Of I and W of one micro-batch."""
        self.run()  # a compiler is done then
        x = self._x.clone().requires_grad_()
        made = self._provider.forward(x)
        with Products() as in_input:
            rest = self._provider.backward_input(made, self._dy, x)
        with Products() as in_weight:
            self._provider.backward_weight(rest, more=False)
        return in_input.count, in_weight.count

    def held(self) -> Held:
        """Of one micro-batch."""
        parameters = list(self._module.parameters())
        with Storages() as storages:
            x = self._x.clone().requires_grad_()
            graph = self._provider.forward(x)[0].grad_fn  # without the output, which goes to the next stage
            after_forward = storages.alive(parameters)
            del graph
            made = self._provider.forward(x)
            rest = self._provider.backward_input(made, self._dy.clone(), x)
            x.grad = None  # a caller that has sent it may do so
            del x, made
            between = storages.alive(parameters)
            self._provider.backward_weight(rest, more=False)
            return Held(after_forward, between, storages.alive(parameters))

    def _now(self) -> float:
        """Seconds; what was asked of a GPU is done."""
        if self._x.is_cuda:
            torch.cuda.synchronize(self._x.device)
        return perf_counter()


# The providers: ``forward`` returns the output and what else I needs, ``backward_input`` what W needs.


class _Whole:
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self._module(x),)

    def backward_input(self, made: tuple[Tensor], dy: Tensor, x: Tensor) -> None:
        torch.autograd.backward(made, [dy])

    def backward_weight(self, rest: None, more: bool) -> None:
        """Nothing is left to do."""


class _Pipex:
    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._splitter = Splitter.of(module)

    def forward(self, x: Tensor) -> tuple[Tensor, Tape]:
        with self._splitter.record() as tape:
            return self._module(x), tape

    def backward_input(self, made: tuple[Tensor, Tape], dy: Tensor, x: Tensor) -> Tape:
        y, tape = made
        tape.backward_input([y], [dy], [x])
        return tape

    def backward_weight(self, rest: Tape, more: bool) -> None:
        rest.backward_weight(more)


class _Torch:
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self._module(x),)

    def backward_input(self, made: tuple[Tensor], dy: Tensor, x: Tensor) -> list[dict[str, Any]]:
        _, rest = stage_backward_input(list(made), [dy], [x], self._module.parameters())
        return rest

    def backward_weight(self, rest: list[dict[str, Any]], more: bool) -> None:
        stage_backward_weight(self._module.parameters(), rest)
