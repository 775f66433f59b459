"""Bits through device memory under many seeds of the simulated driver, which decide what is fast and what is slow.

One launch trains for many steps, each under a seed of its own, and every step's gradients are compared: the step that
is wrong tells the seed that shows it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import device_world
import pytest
import torch
from cases import SEED
from runnable_plans import runnable
from simulated_cuda import Simulator
from torch import Tensor, nn

import pipex
from pipex.plan import Plan
from pipex.runtime.reference import OneProcess

SEEDS, A_FEW = 200, 20
DELAYS = (0, 50, 200, 1000)
"""Longest pauses of the driver in µs, taken in turn."""
QUEUES = ("queues=1", "queues=2,shared=1", "queues=3,shared=1", "queues=8")
"""Of the hardware; a single one for all streams is none on which the runtime uses device memory."""
WIDTH, SAMPLES = 16, 17  # the last micro-batch is smaller


class Layer(nn.Module):
    """Hands two tensors on, so that every edge has two rings."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.linear(x)), x if skipped is None else skipped + x


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        return self.linear(x + skipped)


def layers(stages: int) -> list[nn.Module]:
    torch.manual_seed(8)
    return [*(Layer() for _ in range(stages - 1)), Last()]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, WIDTH, generator=generator), torch.randn(SAMPLES, 1, generator=generator)


def digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=8).hexdigest()


class Witness:
    """An optimizer factory that notes a digest of every gradient it is given."""

    def __init__(self) -> None:
        self.gradients: dict[int, list[str]] = {}

    def __call__(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        self.gradients |= {id(parameter): [] for parameter in parameters}
        optimizer.register_step_pre_hook(lambda *_: self.look(parameters))
        return optimizer

    def look(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            self.gradients[id(parameter)].append(digest(parameter.grad))

    def seen(self, losses: list[float], stages: list[Any]) -> dict[str, Any]:
        """What can be compared: by step, and by name of the parameter."""
        names = {name: tensor for stage in stages for name, tensor in stage.names.items()}
        return {
            "losses": losses,
            "gradients": {name: self.gradients[id(tensor)] for name, tensor in names.items()},
            "parameters": {name: digest(tensor.detach()) for name, tensor in names.items()},
        }


def rank_run(library: Path, family: str, chunks: int, microbatches: int, seeds: range) -> dict[str, Any]:
    world, simulator, witness = pipex.current_world(), Simulator(library), Witness()
    plan = pipex.build(family, world.ranks, microbatches, chunks=chunks)
    pipeline = pipex.Pipeline(layers(plan.placement.pieces), plan, nn.functional.mse_loss, optimizer=witness)
    losses = []
    for seed in seeds:
        simulator.set("seed", seed * world.ranks + world.rank)
        simulator.set("delay", DELAYS[seed % len(DELAYS)])
        losses.append(pipeline.step(*batch(seed)))
    return witness.seen(losses, pipeline.local_stages)


@cache
def one_process(plan: Plan, seeds: range) -> dict[str, Any]:
    witness = Witness()
    process = OneProcess(layers(plan.placement.pieces), plan, nn.functional.mse_loss, optimizer=witness)
    losses = [process.step(*batch(seed)) for seed in seeds]
    return witness.seen(losses, process.stages)


Cell = tuple[str, int, int, int]


def cells() -> list[Cell]:
    """Every family that runs, as it is on 2, 3 and 4 ranks: with 2 chunks where it may have them, and with as few
    micro-batches as it takes, but more than ranks, so that slots are used again within a step."""
    found: dict[tuple[str, int], Cell] = {}
    for family, ranks, chunks, microbatches in runnable(range(2, 5), range(2, 0, -1), range(3, 9)):
        if microbatches > ranks:
            found.setdefault((family, ranks), (family, ranks, chunks, microbatches))
    return list(found.values())


def disagreements(library: Path, settings: str, cell: Cell, seeds: range) -> list[str]:
    """Everything in which a pipeline and one process differ; a gradient or loss with the first seed that shows it."""
    family, ranks, chunks, microbatches = cell
    arguments = (library, family, chunks, microbatches, seeds)
    results = device_world.launch(rank_run, ranks, args=arguments, library=library, settings=f"{settings},poison=1")
    expected = one_process(pipex.build(family, ranks, microbatches, chunks=chunks), seeds)
    found = []
    for rank, result in enumerate(results):
        steps = {"the loss": (result["losses"], expected["losses"])}
        for name, gradients in result["gradients"].items():
            steps[f"the gradient of {name}"] = (gradients, expected["gradients"][name])
        for what, (seen, right) in steps.items():
            wrong = [seed for seed, ours, one in zip(seeds, seen, right, strict=True) if ours != one]
            if wrong:
                found.append(f"rank {rank}: {what} under seed {wrong[0]}")
        found += [f"rank {rank}: {n}" for n, seen in result["parameters"].items() if seen != expected["parameters"][n]]
    assert set().union(*(result["gradients"] for result in results)) == set(expected["gradients"])
    return found


@pytest.mark.parametrize("cell", [("1f1b", 2, 1, 4), ("zb-h1", 3, 1, 4), ("zbv", 2, 2, 4)], ids=str)
def test_bits_are_those_of_one_process_under_a_few_seeds(simulated_cuda: Path, cell: Cell) -> None:
    assert disagreements(simulated_cuda, QUEUES[cell[1] % 2], cell, range(16)) == []


def many_seeds() -> Iterator[Any]:
    """Of every cell a few of its seeds, and for the nights all of them."""
    for number, cell in enumerate(cells()):
        queues = QUEUES[number % len(QUEUES)]
        first = random.Random(f"{SEED} {cell}").randrange(SEEDS - A_FEW)
        yield cell, queues, range(first, first + A_FEW)
        yield pytest.param(cell, queues, range(SEEDS), marks=pytest.mark.nightly)


@pytest.mark.long
@pytest.mark.parametrize(("cell", "queues", "seeds"), list(many_seeds()), ids=str)
def test_bits_are_those_of_one_process_under_many_seeds(
    simulated_cuda: Path, cell: Cell, queues: str, seeds: range
) -> None:
    assert disagreements(simulated_cuda, queues, cell, seeds) == []


@pytest.mark.parametrize("bug", ["dropped-data-wait", "stale-lap", "flag-before-data", "source-free-at-once"])
def test_a_seeded_bug_of_the_protocol_shows(simulated_cuda: Path, bug: str) -> None:
    """Some of tests/native/test_device_ring.py. Not all can: what is early for a compute stream only is not for the
    calling thread, which computes here."""
    assert disagreements(simulated_cuda, f"queues=8,bug={bug}", ("1f1b", 2, 1, 4), range(12))
