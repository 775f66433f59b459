"""Pipelines of Hugging Face models have the bits of transformers in one process: 39 families, all schedules."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import hf_zoo
import host_world
from cases import SEED, case, sampled
from hf_training import Cell, Job, compare, draw, plain, rank_train, train
from hf_zoo import FAMILIES, TWELVE, Example
from runnable_plans import runnable

SCHEDULES = {"1f1b", "zb-h1", "interleaved", "interleaved-zb", "zbv", "gpipe", "zb-h2", "v-half", "v-min"}


@cache
def cells(ranks: int) -> list[Cell]:
    return [cell for cell in runnable(range(ranks, ranks + 1), range(1, 4), range(2, 5)) if cell[0] in SCHEDULES]


def train_and_compare(jobs: list[Job]) -> None:
    """Jobs of as many ranks."""
    ranks = jobs[0].cell[1]
    results = host_world.launch(rank_train, ranks, args=(jobs,))
    for number, job in enumerate(jobs):
        with case(job):
            found = [result[number] for result in results]
            if any("refused" in result for result in found):
                assert job.example.family in MAY_BE_REFUSED, found[0]["refused"]
                assert all("cannot begin at" in result["refused"] for result in found)  # on every rank
            else:
                compare(job, found, plain(job))


MAY_BE_REFUSED = {"gemma3n"}
"""Its last layers may take keys and values of earlier ones, out of a dict that does not travel."""


NAMED = ("zb-h1", "interleaved", "zbv")


def families() -> Iterator[Any]:
    """Every family with each of the three schedules, over 2 to 4 ranks."""
    for family in FAMILIES:
        for schedule in NAMED:
            yield family, schedule


@pytest.mark.parametrize(
    ("family", "schedule"), sampled(families(), 5, name="families", stratum=lambda c: c[0] in TWELVE)
)
def test_pipelines_of_a_family_have_the_bits_of_transformers(family: str, schedule: str) -> None:
    chance = random.Random(f"{family} {schedule}")
    every = [cell for ranks in (2, 3, 4) for cell in cells(ranks) if cell[0] == schedule]
    train_and_compare([draw(Example(family), every, chance)])


RANDOM, SAMPLE, TOGETHER = 120, 24, 4


def groups() -> Iterator[Any]:
    drawn = random.Random(f"{SEED} random configurations").sample(range(RANDOM // TOGETHER), SAMPLE // TOGETHER)
    for number in range(RANDOM // TOGETHER):
        yield pytest.param(number, marks=() if number in drawn else pytest.mark.nightly)


@pytest.mark.parametrize("group", list(groups()))
def test_random_configurations_are_trained_with_the_bits_of_transformers(group: int) -> None:
    """A quarter of the groups over two ranks, the others over one that holds all stages."""
    ranks = 2 if group % 4 == 3 else 1
    names = sorted(FAMILIES)
    train_and_compare(
        [
            draw(Example(names[number % len(names)], 1 + number), cells(ranks), random.Random(number))
            for number in range(group * TOGETHER, (group + 1) * TOGETHER)
        ]
    )


def test_what_comes_to_a_stage_may_require_grad_while_nothing_is_trained() -> None:
    """As embeddings' outputs do under transformers' checkpointing: an evaluation once failed behind such a cut."""
    train_and_compare([Job(Example("llama checkpointing"), ("zb-h1", 1, 1, 2), (6,), 4)])
    train_and_compare([Job(Example("llama checkpointing"), ("interleaved", 1, 2, 2), (1, 5), 4)])


def test_a_single_bit_in_a_gradient_is_seen() -> None:
    job = Job(Example("qwen3"), ("interleaved", 1, 2, 2), (3, 3), 4)
    found, expected = train(job), plain(job)
    compare(job, [found], expected)
    gradient = found["gradients"][1]["model.layers.3.mlp.up_proj.weight"]
    gradient.view(torch.int32)[5, 7] ^= 1
    with pytest.raises(AssertionError, match=r"the gradient of model\.layers\.3\.mlp\.up_proj\.weight in step 2"):
        compare(job, [found], expected)


def test_the_zoo_draws_what_is_different() -> None:
    """Or the random configurations would all be one."""
    for family in FAMILIES:
        shapes = {
            tuple(
                (name, tuple(p.shape), p.requires_grad) for name, p in Example(family, seed).model().named_parameters()
            )
            for seed in (None, 1, 2, 3, 4, 5)
        }
        assert len(shapes) > 1, family


def test_batches_are_padded_and_of_another_length_in_every_step() -> None:
    for family in FAMILIES:
        example = Example(family)
        model = example.model()
        batches = [example.batch(model, step) for step in range(4)]
        for batch in batches:
            if "attention_mask" in batch:
                assert not batch["attention_mask"].all(), family
            if "labels" in batch:
                assert (batch["labels"] == -100).any(), family
        if "input_ids" in batches[0]:
            assert len({batch["input_ids"].shape for batch in batches}) > 1, family
        again = example.batch(model, 1)
        assert all(again[name].equal(tensor) for name, tensor in batches[1].items()), family


def test_every_family_that_must_be_kept_is_in_the_zoo() -> None:
    assert set(TWELVE) <= set(FAMILIES)
    assert len(FAMILIES) >= len(TWELVE) + 6
    assert hf_zoo.LAYERS.keys() <= FAMILIES.keys()
