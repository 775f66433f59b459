"""Plans made here run in torch.distributed.pipelining's runtime, and give the gradients of the unsplit model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import persistent
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch_group import in_group

from pipex.plan import Plan
from pipex.plan.families.dualpipev import dualpipev
from pipex.plan.families.interleaved_zb import interleaved_zb
from pipex.plan.families.one_f_one_b import one_f_one_b
from pipex.plan.families.zb_h1 import zb_h1
from pipex.plan.families.zbv import zbv
from pipex.plan.interop import write_torch_csv
from pipex.plan.interop.torch_csv import Format

WIDTH, SAMPLES = 6, 8


def layers(count: int) -> list[nn.Module]:
    """Non-linear, so that an activation or gradient of another micro-batch or stage gives other numbers."""
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(count)]


def rank_process(
    rank: int, plan: Plan, csv: Path, format: Format, data: tuple[Any, ...]
) -> tuple[dict[int, list[Any]], list[float]]:
    """One rank: torch's runtime with our CSV, for two steps; gradients per stage and the losses."""
    modules, inputs, target = data
    stages = [
        PipelineStage(modules[index], index, len(modules), torch.device("cpu"))
        for index in plan.placement.stages_of(rank)
    ]
    schedule = schedules._PipelineScheduleRuntime(stages, plan.microbatches, loss_fn=nn.functional.mse_loss)  # type: ignore[no-untyped-call]
    schedule._load_csv(str(csv), format=format)
    for _ in range(2):
        for stage in stages:
            stage.submod.zero_grad()
        losses: list[Tensor] = []
        arguments = (inputs,) if rank == plan.placement.rank_of(0) else ()
        last = rank == plan.placement.rank_of(plan.placement.stages - 1)
        schedule.step(*arguments, target=target if last else None, losses=losses)
    gradients = {stage.stage_index: [p.grad.numpy() for p in stage.submod.parameters()] for stage in stages}  # type: ignore[union-attr]
    return gradients, [loss.item() for loss in losses]


Answer = tuple[list[list[Tensor]], list[float]]
"""Gradients per stage, losses per micro-batch."""


@pytest.fixture
def run_in_torch(tmp_path: Path) -> Callable[..., Answer]:
    """``run_in_torch(plan, format, modules, inputs, target)`` runs the plan on as many processes as it has ranks."""

    def run(plan: Plan, format: Format, *data: Any) -> Answer:
        csv = tmp_path / "plan.csv"
        write_torch_csv(plan, csv, format)
        ranks = plan.placement.ranks
        bodies = [
            partial(in_group, tmp_path / "store", rank, ranks, rank_process, rank, plan, csv, format, data)
            for rank in range(ranks)
        ]
        answers = persistent.ranks.results(bodies)
        gradients = {stage: found for answer, _ in answers for stage, found in answer.items()}
        losses = next(losses for _, losses in answers if losses)
        return [[torch.from_numpy(g) for g in gradients[stage]] for stage in sorted(gradients)], losses

    return run


@pytest.mark.parametrize("format", ["compute_only", "compute_comms"])
@pytest.mark.parametrize(
    ("family", "ranks", "chunks"),
    [
        (one_f_one_b, 2, None),
        (zb_h1, 2, None),
        (zb_h1, 4, None),
        (interleaved_zb, 2, 3),
        (zbv, 2, None),
        (dualpipev, 2, None),
    ],
)
def test_a_plan_gives_the_gradients_of_the_unsplit_model_in_torch_s_runtime(
    run_in_torch: Callable[..., Answer], family: Callable[..., Plan], ranks: int, chunks: int | None, format: Format
) -> None:
    plan = family(ranks, 4) if chunks is None else family(ranks, 4, chunks)
    modules = layers(plan.placement.stages)
    inputs, target = torch.randn(SAMPLES, WIDTH).double(), torch.randn(SAMPLES, WIDTH).double()

    gradients, losses = run_in_torch(plan, format, modules, inputs, target)

    whole = nn.Sequential(*copy.deepcopy(modules))
    nn.functional.mse_loss(whole(inputs), target).backward()  # type: ignore[no-untyped-call]
    for module, found in zip(whole, gradients, strict=True):
        for parameter, gradient in zip(module.parameters(), found, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-15)
    parts = zip(inputs.chunk(plan.microbatches), target.chunk(plan.microbatches), strict=True)
    assert losses == pytest.approx([nn.functional.mse_loss(whole(x), y).item() for x, y in parts], rel=1e-12)
