"""Fused pairs of a schedule, both parts at once and one after the other.

    pipex   the schedule as it is: where a rank has cores for both, forward and backward of a pair run in two threads
    apart   the same with every pair taken apart, as ranks without these cores run it

Both are pipelines of the same processes and take turns, step by step, on equal stages (``LAYERS`` × Linear and GELU
each), batches and losses; an operation takes half of a rank's cores. A step's time is the slowest rank's. Every step's
loss must have the bits of one process.

    at_once   how many of the pairs have run at once in the last step, as a share
    overlap   the time of a pair as a share of what both of its parts take in ``apart``: what ``pipex.plan.Costs`` calls
              overlap, to plan and simulate with; the largest of the ranks' medians

On a GPU the two parts go to two streams.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pipex import plan as plans
from pipex.bench import gpu, training
from pipex.bench.driver import Rounds
from pipex.bench.environment import environment
from pipex.bench.options import add_common, floors_of, rounds_of
from pipex.bench.report import Row, finish
from pipex.errors import InputError
from pipex.observe import Recorder
from pipex.plan import Plan
from pipex.plan.bubbles import busy_times
from pipex.runtime.launch import launch
from pipex.runtime.pairs import Pairs
from pipex.runtime.pipeline import Pipeline
from pipex.runtime.reference import OneProcess
from pipex.runtime.worlds import cores_of, current_world, threads_per_rank

PROVIDER, PEER = "pipex", "apart"
LAYERS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``pipex bench pairs``."""
    parser.description = "Fused pairs of dualpipev or dualpipe: both parts at once, and one after the other."
    parser.add_argument("--schedule", choices=("dualpipev", "dualpipe"), default="dualpipev",
                        help="default: dualpipev")  # fmt: skip
    parser.add_argument("--shapes", metavar="WIDTHxBATCH,...", default="64x16,128x64,256x128,512x256,1024x256",
                        help="width of the layers and samples per micro-batch (default: five)")  # fmt: skip
    parser.add_argument("--ranks", metavar="COUNT", type=int, default=1, help="default: 1")
    parser.add_argument("-m", metavar="COUNT", type=int, default=8, help="micro-batches per step (default: 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    add_common(parser, samples=40, floor="how many times faster than apart a step must be, such as 1024x256=1.1")


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code."""
    rounds = rounds_of(options)
    chosen = cases(options.schedule, options.shapes, options.ranks, options.m)
    floors = floors_of(options, PROVIDER, [case.name for case in chosen])
    answers = launch(_rank, options.ranks, args=(chosen, rounds), device=options.device)
    for case, every in zip(chosen, zip(*answers, strict=True), strict=True):
        for rank, answer in enumerate(every):
            if why := Pairs(*answer["pairs"]).why:
                print(f"{case.name}, rank {rank}: {why}", file=sys.stderr)
    rows = [row for number, case in enumerate(chosen) for row in _rows(case, [answer[number] for answer in answers])]
    _, gpu_facts = gpu.chosen(options.device, "pipex bench pairs")
    facts = {"ranks": options.ranks, "schedule": options.schedule, **gpu_facts}
    return finish(environment(_threads(threads_per_rank(options.ranks))) | facts, rows, floors, as_json=options.json)


@dataclass(frozen=True, slots=True)
class Case:
    """A schedule, the width of all layers, and the batch."""

    schedule: str
    ranks: int
    width: int
    samples: int  # per micro-batch
    microbatches: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.samples}"

    def plan(self) -> Plan:
        return plans.build(self.schedule, self.ranks, self.microbatches)

    def stages(self) -> list[nn.Module]:
        """The same weights on every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return [
                nn.Sequential(*(part for _ in range(LAYERS) for part in (nn.Linear(self.width, self.width), nn.GELU())))
                for _ in range(self.plan().placement.pieces)
            ]

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Input and target, the same on every call."""
        shape = 2, self.microbatches * self.samples, self.width
        x, y = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        return x, y


def cases(schedule: str, shapes: str, ranks: int, microbatches: int) -> list[Case]:
    """One per shape, from a text such as ``64x16,1024x256``.

    Raises:
        PlanError: sizes that do not fit the schedule.
        InputError: no shape.
    """
    found = []
    for shape in shapes.split(","):
        width, _, samples = shape.partition("x")
        if not (width.isdecimal() and samples.isdecimal() and int(width) and int(samples)):
            raise InputError("not a shape", got=repr(shape), needed="WIDTHxBATCH, such as 512x256")
        found.append(Case(schedule, ranks, int(width), int(samples), microbatches))
        found[-1].plan()
    return found


def _threads(cores: int) -> int:
    return max(1, cores // 2)


def _optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def _rank(cases: Sequence[Case], rounds: Rounds) -> list[dict[str, Any]]:
    torch.set_num_threads(_threads(cores_of(current_world())))
    return [_measure(case, rounds) for case in cases]


def _measure(case: Case, rounds: Rounds) -> dict[str, Any]:
    """On each rank: times of steps, and of pairs in seconds; losses, and on rank 0 what they must be."""
    world = current_world()
    plan, data = case.plan(), case.batch(world.device)
    recorders = {name: Recorder(rounds.samples) for name in (PROVIDER, PEER)}
    pipelines = {
        name: Pipeline(case.stages(), order, nn.functional.mse_loss, optimizer=_optimizer, observer=recorders[name])
        for name, order in ((PROVIDER, plan), (PEER, plans.unfused(plan)))
    }
    losses: dict[str, list[float]] = {name: [] for name in pipelines}
    times = rounds.interleave({
        name: partial(training.timed, world, partial(_step, pipeline, data, losses[name]))
        for name, pipeline in pipelines.items()
    })  # fmt: skip
    found: dict[str, Any] = {
        "times": times, "losses": losses, "pairs": pipelines[PROVIDER].pairs,
        "together": {name: _pairs(plan, world.rank, recorder) for name, recorder in recorders.items()},
    }  # fmt: skip
    for pipeline in pipelines.values():
        pipeline.close()
    if world.rank == 0:
        process = OneProcess([s.to(world.device) for s in case.stages()], plan, nn.functional.mse_loss,
                             optimizer=_optimizer)  # fmt: skip
        found["wanted"] = [process.step(*data) for _ in range(rounds.warmups + rounds.samples)]
    return found


def _step(pipeline: Pipeline, data: tuple[Tensor, Tensor], losses: list[float]) -> None:
    losses.append(pipeline.step(*data))


def _pairs(plan: Plan, rank: int, recorder: Recorder) -> list[float]:
    """Seconds of each pair in which any part of it ran."""
    events = {(event.step, event.name): event for event in recorder.events}
    found: list[float] = []
    for step in sorted({step for step, _ in events}):
        for action in plan.orders[rank]:
            if action.parts:
                parts = [(event.begin, event.end) for event in (events[step, str(part)] for part in action.parts)]
                found.append(sum(end - begin for begin, end in busy_times(parts)) / 1e9)
    return found


def _rows(case: Case, ranks: Sequence[dict[str, Any]]) -> list[Row]:
    """Two; ``ranks[r]`` is what ``_measure`` has found on rank r."""
    times = {name: training.slowest([rank["times"][name] for rank in ranks]) for name in (PROVIDER, PEER)}
    at_once, fused = (sum(rank["pairs"][place] for rank in ranks) for place in (0, 1))
    overlap = max(median(rank["together"][PROVIDER]) / median(rank["together"][PEER]) for rank in ranks)
    figures = {PROVIDER: {"at_once": at_once / fused, "overlap": overlap}, PEER: {"at_once": 0.0, "overlap": 1.0}}
    return [
        Row(case.name, name, {"shape": [case.microbatches, case.samples, case.width]}, times[name],
            times[PEER].p50 / times[name].p50,
            all(rank["losses"][name] == ranks[0]["wanted"] for rank in ranks), figures[name])
        for name in (PROVIDER, PEER)
    ]  # fmt: skip
