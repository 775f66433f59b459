"""A training step of a two-rank pipeline, beside torch.distributed.pipelining.

    pipex   pipex.Pipeline over shared memory
    torch   torch.distributed.pipelining's schedule of the same name, over Gloo on the loopback interface

Both run in the same two processes, on equal stages (8 × Linear and GELU each), batches, loss and micro-batches. Nothing
is updated: where pipex expects an optimizer it gets one that only keeps the gradients, and both begin every step
without gradients. Every step's gradients are compared with one process: pipex's must be equal bit by bit, torch's
within ``TOLERANCE``.

The same stages' work alone, without communication, is measured in the same rounds, on both ranks at once: plain
autograd on inputs and output gradients that are there already, in the order in which the schedule has this rank's
actions. A round is one step of pipex, one of torch, and this work once. A step's time is the slower rank's.

    overhead_us_per_action   (step − compute of the busiest rank) / actions of a rank; holds what the schedule leaves
                             idle at the ends of a step too, which is the same for both
    net_us_per_action        (step − simulated step) / actions of a rank: the plan simulated with the measured times of
                             its actions and messages that take none, so what is left is what running it costs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from pipex import plan as plans
from pipex.bench import torch_group
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.environment import environment
from pipex.bench.options import add_common, floors_of, rounds_of
from pipex.bench.report import Row, finish
from pipex.bench.step_providers import ComputeAlone, PipexStep, TorchStep
from pipex.errors import InputError
from pipex.runtime.launch import launch
from pipex.runtime.reference import OneProcess
from pipex.runtime.worlds import current_world, threads_per_rank
from pipex.transport.interface import World

PROVIDER, PEER, COMPUTE = "pipex", "torch", "compute"
SCHEDULES = ("gpipe", "1f1b")  # those that both sides have and that do not split the backward
RANKS = 2
LAYERS = 8
TOLERANCE = 1e-5
"""Largest error of torch's gradients, relative to the tensor's largest element: it sums in another order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``pipex bench step``."""
    parser.description = "A training step of a two-rank pipeline: pipex and torch.distributed.pipelining (Gloo)."
    parser.add_argument("--schedules", default="gpipe,1f1b", help="of gpipe and 1f1b (default: both)")
    parser.add_argument("--shapes", metavar="WIDTHxBATCH,...", default="64x4,1024x64",
                        help="width of the layers and samples per micro-batch (default: 64x4,1024x64)")  # fmt: skip
    parser.add_argument("-m", metavar="COUNT", type=int, default=16, help="micro-batches per step (default: 16)")
    add_common(parser, samples=20, floor="how many times faster than torch's a step must be, such as 1f1b/1024x64=1")
    parser.add_argument("--min-overhead-ratio", metavar="CASE=RATIO,...",
                        help="torch's overhead per action over pipex's, such as 1f1b/64x4=5")  # fmt: skip
    parser.add_argument("--min-net-ratio", metavar="CASE=RATIO,...", help="the same of what is not the plan's bubble")


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code."""
    rounds, chosen = rounds_of(options), cases(options.schedules, options.shapes, options.m)
    floors = floors_of(options, PROVIDER, [case.name for case in chosen])
    return finish(environment(threads_per_rank(RANKS)), measure(chosen, rounds), floors, as_json=options.json)


@dataclass(frozen=True, slots=True)
class Case:
    """What is run: the schedule, the width of all layers, and the batch."""

    schedule: str
    width: int
    samples: int  # per micro-batch
    microbatches: int

    @property
    def name(self) -> str:
        return f"{self.schedule}/{self.width}x{self.samples}"

    def plan(self) -> plans.Plan:
        return plans.build(self.schedule, RANKS, self.microbatches)

    def stages(self) -> list[nn.Module]:
        """The same weights on every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [
                nn.Sequential(
                    *(layer for _ in range(LAYERS) for layer in (nn.Linear(self.width, self.width), nn.GELU()))
                )
                for _ in range(RANKS)
            ]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Input and target, the same on every call."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.microbatches * self.samples, self.width)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def cases(schedules: str, shapes: str, microbatches: int) -> list[Case]:
    """Every schedule with every shape, from texts such as ``gpipe,1f1b`` and ``64x4,1024x64``.

    Raises:
        InputError: a schedule that torch.distributed.pipelining does not have as well, or no shape.
    """
    if microbatches < RANKS:
        raise InputError("too few micro-batches", got=microbatches, needed=f"at least {RANKS}, one per rank")
    found = []
    for schedule in schedules.split(","):
        if schedule not in SCHEDULES:
            raise InputError("not a schedule that both sides have", got=repr(schedule),
                             needed=f"one of {', '.join(SCHEDULES)}")  # fmt: skip
        for shape in shapes.split(","):
            width, _, samples = shape.partition("x")
            if not (width.isdecimal() and samples.isdecimal() and int(width) and int(samples)):
                raise InputError("not a shape", got=repr(shape), needed="WIDTHxBATCH, such as 64x4")
            found.append(Case(schedule, int(width), int(samples), microbatches))
    return found


def measure(cases: Sequence[Case], rounds: Rounds) -> list[Row]:
    """Two rows per case, with the figures step_us, compute_us, simulated_us, overhead_us_per_action, overhead_ratio,
    net_us_per_action and net_ratio.

    A ratio is torch's figure over the row's own; None where the row's own is too small to be seen.
    """
    jobs = [asdict(case) for case in cases]
    ranks = launch(_rank, RANKS, args=(jobs, rounds.samples, rounds.warmups))
    return [row for index, case in enumerate(cases) for row in _rows(case, [rank[index] for rank in ranks])]


def _rows(case: Case, ranks: Sequence[Mapping[str, Any]]) -> list[Row]:
    """``ranks[r]`` is what ``_measure_case`` returned on rank r."""
    slowest = {
        name: quantiles([max(times) for times in zip(*(rank["samples"][name] for rank in ranks), strict=True)])
        for name in (PROVIDER, PEER)
    }
    compute_us = max(quantiles(rank["samples"][COMPUTE]).p50 for rank in ranks)
    simulated_us = simulated(
        case.plan(), [{kind: median(times) for kind, times in r["actions"].items()} for r in ranks]
    )
    rows = []
    for name, time in slowest.items():
        figures: dict[str, float | None] = {"step_us": time.p50, "compute_us": compute_us, "simulated_us": simulated_us}
        beyond = []
        for figure, least in (("overhead", compute_us), ("net", simulated_us)):
            own, peer = (t.p50 - least for t in (time, slowest[PEER]))
            figures[f"{figure}_us_per_action"] = own / (2 * case.microbatches)
            figures[f"{figure}_ratio"] = peer / own if own > 0 else None
            beyond += [f"{figure}_ratio"] * (own <= 0)
        correct = all(rank["correct"][name] and rank["correct"][COMPUTE] for rank in ranks)
        rows.append(Row(case.name, name, {"shape": [case.samples, case.width]}, time, slowest[PEER].p50 / time.p50,
                        correct, figures, beyond))  # fmt: skip
    return rows


def simulated(plan: plans.Plan, stages: Sequence[Mapping[str, float]]) -> float:
    """The step's time where nothing costs anything but the actions, whose times are given per stage by kind."""
    costs = plans.Costs.uniform(plan, weight_gradient=0)
    costs = replace(costs, forward=[stage["F"] for stage in stages], input_gradient=[stage["B"] for stage in stages])
    return plans.simulate(plan, costs).makespan


def _rank(jobs: Sequence[Mapping[str, Any]], samples: int, warmups: int) -> list[dict[str, Any]]:
    """On each rank, for each case: its samples in µs and whether its gradients were right, by provider, and the mean F
    and B of each round of the work alone, in µs."""
    world = current_world()
    with torch_group.joined(world):
        return [_measure_case(world, Case(**job), Rounds(samples, warmups)) for job in jobs]


def _measure_case(world: World, case: Case, rounds: Rounds) -> dict[str, Any]:
    batch, target = case.batch()
    reference = OneProcess(case.stages(), case.microbatches, nn.functional.mse_loss)
    reference.forward_backward(batch, target)
    reference.reduce_gradients()
    wanted = [p.grad for p in reference.stages[world.rank].parameters() if p.grad is not None]

    plan = case.plan()
    pipex_step = PipexStep(case.stages(), plan, batch, target)
    torch_step = TorchStep(case.stages(), case.schedule, plan, world.rank, batch, target)
    compute = ComputeAlone(case.stages(), plan, world.rank, batch, target)
    steps = {
        PROVIDER: TimedStep(world, pipex_step.run, wanted, tolerance=0),
        PEER: TimedStep(world, torch_step.run, wanted, TOLERANCE),
        COMPUTE: TimedStep(world, compute.run, wanted, tolerance=0),
    }
    times = rounds.interleave({name: step.sample for name, step in steps.items()})
    pipex_step.close()
    return {
        "samples": times,
        "actions": {kind: microseconds[-rounds.samples :] for kind, microseconds in compute.microseconds.items()},
        "correct": {name: step.correct for name, step in steps.items()},
    }


class TimedStep:
    """Runs, times and checks steps of one provider.

    Args:
        run: one step; returns this rank's gradients.
        wanted: what they must be.
        tolerance: their largest error, relative to the tensor's largest element; 0 asks for equal bits.
    """

    def __init__(
        self, world: World, run: Callable[[], list[Tensor]], wanted: Sequence[Tensor], tolerance: float
    ) -> None:
        self._world, self._run, self._wanted, self._tolerance = world, run, wanted, tolerance
        self.correct = True

    def sample(self) -> float:
        """Microseconds of one step on this rank."""
        self._world.exchange(b"")  # both ranks begin together
        begin = perf_counter()
        gradients = self._run()
        seconds = perf_counter() - begin
        self._world.exchange(b"")  # nobody compares while the other one is timed
        self.correct = self.correct and all(
            torch.equal(g, w)
            if self._tolerance == 0
            else float((g - w).abs().max()) <= self._tolerance * float(w.abs().max())
            for g, w in zip(gradients, self._wanted, strict=True)
        )
        return seconds * 1e6
