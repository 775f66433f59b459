"""How much of a step is communication that computing does not hide, for each schedule.

    pipex   pipex.Pipeline on transformer blocks: shared memory between CPU ranks, the GPUs' memory between GPU ranks
    free    the same plan simulated with the action times of that run, and messages that take no time

A sample is the makespan of a step's actions, from the first start to the last end over all ranks. ``exposed_share`` is
the part of it that the rank that waited longest spent on messages: the time in which it computed nothing because it
handed one over, or waited for one that its peer had handed over already. Waiting for a peer that is not done is the
schedule's, not communication's; ``waiting_share`` has both. ``bubble`` is the makespan bubble. Losses are compared with
those of one process: bit by bit on the CPU, within ``TOLERANCE`` on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pipex import plan as plans
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.report import Row
from pipex.cli.train.model import Block, ModelConfig
from pipex.observe import Event, Recorder, measure
from pipex.observe.measure import COMPUTE, message_waits
from pipex.plan.view.measured import measured_costs
from pipex.runtime.agreement import share
from pipex.runtime.launch import launch
from pipex.runtime.pipeline import Pipeline
from pipex.runtime.reference import OneProcess
from pipex.runtime.worlds import current_world

PROVIDER, PEER = "pipex", "free"
TOLERANCE = 1e-3
"""Largest difference of a loss on a GPU, relative."""


@dataclass(frozen=True)
class Case:
    """A schedule on a model: ``blocks`` per stage, micro-batches of one sequence."""

    schedule: str
    ranks: int
    microbatches: int
    width: int
    tokens: int
    blocks: int = 2

    @property
    def name(self) -> str:
        return f"{self.schedule}/{self.width}x{self.tokens}"

    def plan(self) -> plans.Plan:
        return plans.build(self.schedule, self.ranks, self.microbatches)

    def stages(self, count: int) -> list[nn.Module]:
        """The same weights on every call."""
        torch.manual_seed(0)
        config = ModelConfig(self.width, max(1, self.width // 64), layers=self.blocks, context=self.tokens)
        return [nn.Sequential(*(Block(config) for _ in range(self.blocks))) for _ in range(count)]

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (self.microbatches, self.tokens, self.width)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def cases(schedules: str, ranks: int, microbatches: int, device: str) -> list[Case]:
    """One per schedule, from a text such as ``1f1b,zb-h1``; larger on a GPU.

    Raises:
        PlanError: an unknown schedule, or sizes that do not fit it.
    """
    width, tokens = {"cpu": (128, 64), "cuda": (2048, 2048)}[device]
    found = [Case(schedule, ranks, microbatches, width, tokens) for schedule in schedules.split(",")]
    for case in found:
        case.plan()
    return found


def run(cases: Sequence[Case], rounds: Rounds, device: str) -> list[Row]:
    """Two rows per case."""
    return [row for case in cases for row in _rows(case, rounds, device)]


def _rows(case: Case, rounds: Rounds, device: str) -> list[Row]:
    answers = launch(_rank, case.ranks, args=(asdict(case), rounds.samples, rounds.warmups), device=device)
    events = [[Event(*event) for event in rank] for rank in answers[0]["events"]]
    figures = measure(events)
    steps = sorted({event.step for event in events[0]})
    spans, exposed, waiting = [], [], []
    for step in steps:
        ranks = [[event for event in rank if event.step == step] for rank in events]
        compute = [[event for event in rank if event.kind in COMPUTE] for rank in ranks]
        span = max(rank[-1].end for rank in compute) - min(rank[0].begin for rank in compute)
        spans.append(span / 1e3)
        on_messages = [waits + _seconds(rank, "SEND") for rank, waits in zip(ranks, message_waits(ranks), strict=True)]
        exposed.append(max(on_messages) / (span / 1e9))
        waiting.append(max(_seconds(rank, "RECV") for rank in ranks) / (span / 1e9))
    simulated = plans.simulate(case.plan(), measured_costs(case.plan(), figures.action, 0.0))
    free = 1e6 * simulated.makespan
    time = quantiles(spans)
    shares: dict[str, float | None] = {
        "exposed_share": median(exposed),
        "waiting_share": median(waiting),
        "bubble": figures.bubble_makespan,
        "tokens_per_s": 1e6 * case.microbatches * case.tokens / time.p50,
    }
    ideal = {**dict.fromkeys(shares), "bubble": simulated.bubble_makespan}
    size = {"shape": [case.microbatches, case.tokens, case.width]}
    correct = all(answer["correct"] for answer in answers)
    return [
        Row(case.name, PROVIDER, size, time, free / time.p50, correct, shares),
        Row(case.name, PEER, size, quantiles([free]), 1.0, True, ideal),
    ]


def _seconds(events: Sequence[Event], kind: str) -> float:
    return sum(event.end - event.begin for event in events if event.kind.startswith(kind)) / 1e9


def _rank(job: dict[str, Any], samples: int, warmups: int) -> dict[str, Any]:
    world, case = current_world(), Case(**job)
    plan = case.plan()
    recorder = Recorder(samples)
    pipeline = Pipeline(
        case.stages(plan.placement.stages), plan, nn.functional.mse_loss, optimizer=_optimizer, observer=recorder
    )
    batch, target = case.batch()
    losses = [pipeline.step(batch, target) for _ in range(warmups + samples)]
    every = share(world, "the events", {"events": recorder.events})
    pipeline.close()
    correct = world.rank != 0 or _as_one_process(case, losses, world.device)
    return {"correct": correct, "events": [rank["events"] for rank in every] if world.rank == 0 else None}


def _as_one_process(case: Case, losses: Sequence[float], device: torch.device) -> bool:
    stages = [stage.to(device) for stage in case.stages(case.plan().placement.stages)]
    process = OneProcess(stages, case.microbatches, nn.functional.mse_loss, optimizer=_optimizer)
    batch, target = (tensor.to(device) for tensor in case.batch())
    tolerance = 0.0 if device.type == "cpu" else TOLERANCE
    return all(math.isclose(process.step(batch, target), loss, rel_tol=tolerance) for loss in losses)


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)
