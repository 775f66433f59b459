"""Pipelines of random models have the bits of one process of plain torch: 63 kinds of layer, every schedule."""

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
from layer_kinds import KEEPING
from random_models import STEPS, Model, Plain
from runnable_plans import runnable
from trained_models import Cell, compare, rank_train

import pipex

MODELS, SAMPLE, TOGETHER = 500, 60, 10


@cache
def cells(ranks: int) -> list[Cell]:
    return runnable(range(ranks, ranks + 1), range(1, 3), range(2, 6))


def drawn(first: int, count: int) -> Iterator[tuple[Cell, Model, Spared, dict[str, Any]]]:
    """So many that plain torch can train; it refuses some, such as an in-place layer behind a tanh. Half of the plans
    recompute some stages, and offload others."""
    torch.set_num_threads(1)
    seed = first
    while count:
        chance = random.Random(seed)
        cell = chance.choice(cells(first % 4 + 1))
        family, cell_ranks, chunks, microbatches = cell
        plan = pipex.build(family, cell_ranks, microbatches, chunks=chunks)
        copies = len(plan.placement.pipes) > 1
        spared = draw_spared(chance, plan.placement.stages)
        without = KEEPING if copies or spared["recomputed"] else ()
        model = random_models.draw(seed, plan.placement.pieces, microbatches, without=without)
        seed += 1000
        try:
            plain = Plain(model, [plan.copy_of(m) for m in range(microbatches)])
            if not plain.parameters:
                continue
            expected = plain.train()
        except RuntimeError:
            continue
        count -= 1
        yield cell, model, spared, expected


Spared = dict[str, tuple[int, ...]]
"""The plan's fields ``recomputed`` and ``offloaded``."""


def draw_spared(chance: random.Random, stages: int) -> Spared:
    fates = [chance.choice(("kept", "recomputed", "offloaded")) for _ in range(stages)]
    if chance.random() < 0.5:
        fates = ["kept"] * stages
    return {kind: tuple(s for s, fate in enumerate(fates) if fate == kind) for kind in ("recomputed", "offloaded")}


def groups() -> Iterator[Any]:
    sample = random.Random(f"{SEED} random models").sample(range(MODELS // TOGETHER), SAMPLE // TOGETHER)
    for number in range(MODELS // TOGETHER):
        yield pytest.param(number, marks=() if number in sample else pytest.mark.nightly)


@pytest.mark.parametrize("group", list(groups()))
def test_random_models_have_the_bits_of_plain_torch(group: int) -> None:
    models = list(drawn(group, TOGETHER))
    ranks = group % 4 + 1
    jobs = [(cell, model) for cell, model, _, _ in models]
    results = host_world.launch(rank_train, ranks, args=(jobs, STEPS, [spared for *_, spared, _ in models]))
    for number, (cell, model, spared, expected) in enumerate(models):
        with case(cell, model, spared):
            compare([result[number] for result in results], expected)
