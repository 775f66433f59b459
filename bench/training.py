"""A transformer that schedules train, its steps timed and their losses kept: what ``overlap`` and ``pipeline`` measure.

All schedules of a run train the same model on the same tokens, whatever their number of stages: an embedding, as many
blocks on every rank, a head, next-token loss, plain SGD; in float32 on the CPU and in bfloat16 on a GPU. A rank with
several stages has its blocks shared out among them.

A step's time is that of the whole call: from when all ranks have come to its beginning to the end of the slowest one's,
the GPU's work, loss and optimizer included.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from pipex import plan as plans
from pipex.bench import gpu
from pipex.bench.driver import Quantiles, Rounds, quantiles
from pipex.bench.environment import environment
from pipex.bench.options import floors_of, rounds_of
from pipex.bench.report import Row, finish
from pipex.bench.virtual_devices import shared_among
from pipex.errors import InputError
from pipex.models.transformer import ModelConfig, Transformer, next_token_loss
from pipex.observe import Event, Recorder
from pipex.observe.measure import ACTION_KINDS, Figures
from pipex.partition import Stage, split_model
from pipex.plan.measured import measured_costs
from pipex.runtime.pipeline import Pipeline
from pipex.runtime.reference import OneProcess
from pipex.runtime.worlds import threads_per_rank
from pipex.transport.interface import World

BLOCKS = 2
"""On every rank; a multiple of the chunks that schedules have."""

SIZES = {"cpu": (128, 64), "cuda": (2048, 2048)}
"""Width, and tokens of a micro-batch."""

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

LEARNING = 0.03
"""The learning rate, times the root of the width: losses then tell in time whether gradients are right, and stay calm.

Where the matrices of one block are not updated, the second loss is off by 1e-3 of itself and the sixth by 6e-3 or more.
bfloat16's rounding errors make 8e-5 at most in 25 steps. (On the CPU; two or four blocks, widths 128 to 1024.) At four
times this rate a step can grow rounding errors a thousandfold.
"""

TOLERANCE = {"cpu": 0.0, "cuda": 1e-3}
"""Largest relative difference between a loss of pipex and one process's."""

TORCH_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}
"""The same for torch, which sums in another order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what is trained, and where."""
    parser.add_argument("--schedules", default="gpipe,1f1b,zb-h1,zbv", help="default: gpipe,1f1b,zb-h1,zbv")
    parser.add_argument("--ranks", metavar="COUNT", type=int, default=None,
                        help="default: 2; with --virtual-devices 4")  # fmt: skip
    parser.add_argument("-m", metavar="COUNT", type=int, default=8, help="micro-batches per step (default: 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where; a larger model, in bfloat16, on cuda (default: cpu)")  # fmt: skip
    parser.add_argument("--virtual-devices", action="store_true",
                        help="ranks that share a GPU compute at once, with an equal share of it each")  # fmt: skip


def run(
    options: argparse.Namespace,
    cases: Callable[[str, int, int, str], list[Case]],
    measure: Callable[[Sequence[Case], Rounds], list[Row]],
    provider: str,
) -> int:
    """Measures and reports the chosen cases; returns the exit code.

    Args:
        cases: makes them of schedules, ranks, micro-batches and device; raises what does not fit.
        provider: floors are for its rows.
    """
    rounds = rounds_of(options)
    if options.virtual_devices and options.device == "cpu":
        raise InputError("CPUs are not shared out", got="--virtual-devices", needed="--device cuda with it")
    ranks = options.ranks if options.ranks is not None else 4 if options.virtual_devices else 2
    chosen = cases(options.schedules, ranks, options.m, options.device)
    floors = floors_of(options, provider, [case.name for case in chosen])
    with shared_among(ranks) if options.virtual_devices else nullcontext():
        rows = measure(chosen, rounds)
    # Afterwards: CUDA must not start in this process before its ranks have.
    _, gpu_facts = gpu.chosen(options.device, f"pipex bench {options.bench}")
    facts = {"ranks": ranks, "virtual_devices": options.virtual_devices, **gpu_facts}
    return finish(environment(threads_per_rank(ranks)) | facts, rows, floors, as_json=options.json)


@dataclass(frozen=True)
class Case:
    """A schedule on a model; micro-batches of one sequence."""

    schedule: str
    ranks: int
    microbatches: int
    device: str
    width: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.schedule}/{self.width}x{self.tokens}"

    @property
    def size(self) -> dict[str, list[int]]:
        """For a row."""
        return {"shape": [self.microbatches, self.tokens, self.width]}

    def plan(self) -> plans.Plan:
        return plans.build(self.schedule, self.ranks, self.microbatches)

    def stages(self, count: int) -> list[Stage]:
        """The same weights on every call."""
        blocks = self.ranks * BLOCKS
        layers = [blocks // count] * count
        layers[0] += 1  # the embedding
        layers[-1] += 1  # the head
        config = ModelConfig(self.width, heads=max(1, self.width // 64), layers=blocks, context=self.tokens)
        return split_model(copy.deepcopy(_model(config, DTYPES[self.device])), count, layers)

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens to predict, which follow from them; the same on every call."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(256, (self.microbatches, self.tokens), generator=generator).to(device)
        return tokens, (tokens + 1) % 256

    def tokens_per_s(self, time: Quantiles) -> float:
        """``time``: of a step, in microseconds."""
        return 1e6 * self.microbatches * self.tokens / time.p50

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=LEARNING / math.sqrt(self.width))


@functools.cache  # large ones take seconds
def _model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Transformer(config).to(dtype)


def cases(schedules: str, ranks: int, microbatches: int, device: str) -> list[Case]:
    """One per schedule, from a text such as ``1f1b,zb-h1``; larger on a GPU.

    Raises:
        PlanError: an unknown schedule, or sizes that do not fit it.
    """
    found = [Case(schedule, ranks, microbatches, device, *SIZES[device]) for schedule in schedules.split(",")]
    for case in found:
        case.plan()
    return found


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """In float32, whatever the model is in."""
    return next_token_loss(logits.float(), target)


class Training:
    """A plan that ``pipex.Pipeline`` trains by. Several may be open at once and take turns.

    Attributes:
        losses: of all steps.
    """

    def __init__(self, case: Case, plan: plans.Plan, world: World, samples: int) -> None:
        """``samples``: how many steps' events are kept, the last ones."""
        self.losses: list[float] = []
        self._recorder = Recorder(samples)
        self._pipeline = Pipeline(
            case.stages(plan.placement.stages), plan, loss_of, optimizer=case.optimizer, observer=self._recorder
        )
        self._data = case.batch(world.device)
        self.close = self._pipeline.close

    def step(self) -> None:
        self.losses.append(self._pipeline.step(*self._data))

    @property
    def events(self) -> list[Event]:
        return self._recorder.events


def timed(world: World, step: Callable[[], None]) -> float:
    """Microseconds of a step on this rank."""
    world.exchange(b"")  # all begin together
    begin = perf_counter()
    step()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return 1e6 * (perf_counter() - begin)


def losses_of_one_process(case: Case, steps: int, device: torch.device) -> list[float]:
    """What the losses must be."""
    stages = [stage.to(device) for stage in case.stages(1)]
    process = OneProcess(stages, case.microbatches, loss_of, optimizer=case.optimizer)
    batch, target = case.batch(device)
    return [process.step(batch, target) for _ in range(steps)]


# What the ranks answered.


def slowest(times: Sequence[Sequence[float]]) -> Quantiles:
    """Of the steps' times; ``times[r]`` are those of rank r."""
    return quantiles([max(step) for step in zip(*times, strict=True)])


def agree(losses: Sequence[float], wanted: Sequence[float], tolerance: float) -> bool:
    """Whether these are one process's losses, all of them."""
    pairs = zip(losses, wanted, strict=True)
    return all(math.isclose(loss, right, rel_tol=tolerance) for loss, right in pairs)


def simulated(
    plan: plans.Plan, events: Sequence[Sequence[Event]], figures: Figures, *, free: bool = False
) -> plans.Simulation:
    """The plan's course with the action times of this run of it, and with its median message unless they are free."""
    hop = 0.0 if free or not figures.messages else max(0.0, median(figures.messages))
    return plans.simulate(plan, measured_costs(plan, action_times(events), hop, figures.overlap))


def action_times(events: Sequence[Sequence[Event]]) -> Mapping[tuple[str, int], float]:
    """Seconds of an action by (kind, stage): the mean of a step's, of which the median over the steps.

    The mean, since on a GPU the first of several W in a row may leave their work to the last.
    """
    steps: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rank in events:
        for event in rank:
            if event.kind in ACTION_KINDS:
                steps[event.kind, event.stage][event.step].append((event.end - event.begin) / 1e9)
    return {key: median(map(fmean, by_step.values())) for key, by_step in steps.items()}


def events_of(answer: Sequence[Any]) -> list[Event]:
    """From what JSON has made of them."""
    return [Event(*event) for event in answer]
