"""Random models trained by pipelines, and compared with what plain torch has found."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import random_models
import torch
from random_models import STEPS, Model, gradients, tensors
from torch import nn

import pipex
from pipex.plan.memory import with_promise

Cell = tuple[str, int, int, int]
"""Schedule, ranks, chunks, micro-batches."""


def rank_train(
    jobs: list[tuple[Cell, Model]], steps: int = STEPS, spared: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """``spared``: fields of the plans, such as ``{"recomputed": (0, 2)}``."""
    torch.set_num_threads(1)
    return [train(*job, steps, spared[number] if spared else None) for number, job in enumerate(jobs)]


def train(cell: Cell, model: Model, steps: int, spared: dict[str, Any] | None = None) -> dict[str, Any]:
    family, ranks, chunks, microbatches = cell
    plan = pipex.build(family, ranks, microbatches, chunks=chunks)
    if spared is not None:
        plan = with_promise(dataclasses.replace(plan, **spared))  # the smallest, so that as much as can be moves
    stages = pipex.split_model(nn.Sequential(*model.layers()), plan, balance=model.counts)
    pipeline = pipex.Pipeline(
        stages, plan, random_models.loss_fn, optimizer=random_models.optimizer, seed=random_models.SEED
    )
    own = [(s.first_layer + n, layer) for s in pipeline.local_stages for n, layer in enumerate(s.layers)]
    found: dict[str, Any] = {"losses": [], "gradients": []}
    if pipeline.optimizer is not None:
        pipeline.optimizer.register_step_pre_hook(lambda *_: found["gradients"].append(gradients(own)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no gradient came to")  # some layers do not use all of their parameters
        found["losses"] = [pipeline.step(*model.batch(step)) for step in range(1, steps + 1)]
    found["tensors"] = tensors(own)
    found["evaluated"] = pipeline.evaluate(*model.batch(steps + 1))
    pipeline.close()
    return found


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
