"""Pipelines of random models have the bits of one process of plain torch: 58 kinds of layer, every schedule."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import host_world
import pytest
import random_models
import torch
from cases import SEED, case
from random_models import STEPS, Model, Plain, gradients, tensors
from runnable_plans import runnable
from torch import nn

import pipex

MODELS, SAMPLE, TOGETHER = 500, 60, 10

Cell = tuple[str, int, int, int]
"""Schedule, ranks, chunks, micro-batches."""


def rank_train(jobs: list[tuple[Cell, Model]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [train(*job) for job in jobs]


def train(cell: Cell, model: Model) -> dict[str, Any]:
    family, ranks, chunks, microbatches = cell
    plan = pipex.build(family, ranks, microbatches, chunks=chunks)
    stages = pipex.split_model(nn.Sequential(*model.layers()), plan.placement.stages, balance=model.counts)
    pipeline = pipex.Pipeline(
        stages, plan, random_models.loss_fn, optimizer=random_models.optimizer, seed=random_models.SEED
    )
    own = [(s.first_layer + n, layer) for s in pipeline.local_stages for n, layer in enumerate(s.layers)]
    found: dict[str, Any] = {"losses": [], "gradients": []}
    if pipeline.optimizer is not None:
        pipeline.optimizer.register_step_pre_hook(lambda *_: found["gradients"].append(gradients(own)))
    found["losses"] = [pipeline.step(*model.batch(step)) for step in range(1, STEPS + 1)]
    found["tensors"] = tensors(own)
    found["evaluated"] = pipeline.evaluate(*model.batch(STEPS + 1))
    pipeline.close()
    return found


@cache
def cells(ranks: int) -> list[Cell]:
    return runnable(range(ranks, ranks + 1), range(1, 3), range(2, 6))


def drawn(first: int, count: int) -> Iterator[tuple[Cell, Model, dict[str, Any]]]:
    """So many that plain torch can train; it refuses some, such as an in-place layer behind a tanh."""
    torch.set_num_threads(1)
    seed = first
    while count:
        chance = random.Random(seed)
        cell = chance.choice(cells(first % 4 + 1))
        model = random_models.draw(seed, cell[1] * cell[2], cell[3])
        seed += 1000
        try:
            plain = Plain(model)
            if not plain.parameters:
                continue
            expected = plain.train()
        except RuntimeError:
            continue
        count -= 1
        yield cell, model, expected


def compare(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in results:
        assert result["losses"] == expected["losses"]
        assert result["evaluated"] == expected["evaluated"]
        for step, found in enumerate(result["gradients"]):
            for name, one in found.items():
                assert one == expected["gradients"][step][name], f"the gradient of {name} in step {step + 1}"
        for name, one in result["tensors"].items():
            assert one == expected["tensors"][name], name
    assert set().union(*(result["tensors"] for result in results)) == set(expected["tensors"])


def groups() -> Iterator[Any]:
    sample = random.Random(f"{SEED} random models").sample(range(MODELS // TOGETHER), SAMPLE // TOGETHER)
    for number in range(MODELS // TOGETHER):
        yield pytest.param(number, marks=() if number in sample else pytest.mark.nightly)


@pytest.mark.parametrize("group", list(groups()))
def test_random_models_have_the_bits_of_plain_torch(group: int) -> None:
    models = list(drawn(group, TOGETHER))
    ranks = group % 4 + 1
    results = host_world.launch(rank_train, ranks, args=([(cell, model) for cell, model, _ in models],))
    for number, (cell, model, expected) in enumerate(models):
        with case(cell, model):
            compare([result[number] for result in results], expected)
