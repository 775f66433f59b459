"""A training step of a Hugging Face Llama in a pipeline of two ranks, beside torch's way to cut such a model.

    pipex   ``pipex.split_model`` by the model's own forward, and ``pipex.Pipeline`` over shared memory
    torch   ``torch.distributed.pipelining.pipeline``, which traces the model for one shape of micro-batch, and torch's
            schedule that stands beside this one, over Gloo on the loopback interface

Both run in the same two processes, with the same weights, batches without padding, micro-batches and cut: the embedding
and half of the layers on the first rank, the rest and the loss on the second. pipex takes the labels with the batch and
the model's own loss; a traced stage has no loss, so torch's side is given the same one as a function of logits and
labels. Nothing is updated, as in ``bench.step``. A round is one step of each; its time is the slower rank's. Every
step's gradients, and the last one's loss, are compared with the unsplit model in one process.

    made_ms    what making the stages took, once: pipex's run the model, and verify themselves against it unsplit
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import SplitPoint, pipeline

from pipex import plan as plans
from pipex.bench import torch_group
from pipex.bench.driver import Rounds, quantiles
from pipex.bench.environment import environment
from pipex.bench.options import add_common, floors_of, rounds_of
from pipex.bench.report import Row, finish
from pipex.bench.step import TimedStep
from pipex.bench.step_providers import PipexStep
from pipex.bench.torch_schedules import torch_schedule
from pipex.errors import InputError
from pipex.partition import split_model
from pipex.runtime.launch import launch
from pipex.runtime.worlds import current_world, threads_per_rank
from pipex.transport.interface import World

PROVIDER, PEER = "pipex", "torch"
SCHEDULES = ("gpipe", "1f1b", "zb-h1")
RANKS = 2
LAYERS = 4
SAMPLES = 2
"""Sequences of a micro-batch."""
VOCABULARY = 256
TOLERANCE = 1e-5
"""Largest error of a gradient, relative to the tensor's largest element: sums in another order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``pipex bench hugging-face``."""
    parser.description = "A training step of a Hugging Face Llama: pipex and torch's pipeline(), in two ranks."
    parser.add_argument("--schedules", default="1f1b,zb-h1", help="of gpipe, 1f1b and zb-h1 (default: 1f1b,zb-h1)")
    parser.add_argument("--shapes", metavar="WIDTHxTOKENS,...", default="64x32,128x64",
                        help="hidden size, and tokens per sequence (default: 64x32,128x64)")  # fmt: skip
    parser.add_argument("-m", metavar="COUNT", type=int, default=8, help="micro-batches per step (default: 8)")
    add_common(parser, samples=20, floor="how many times faster than torch's a step must be, such as 1f1b/64x32=1")


def run(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code."""
    rounds, chosen = rounds_of(options), cases(options.schedules, options.shapes, options.m)
    floors = floors_of(options, PROVIDER, [case.name for case in chosen])
    return finish(environment(threads_per_rank(RANKS)), measure(chosen, rounds), floors, as_json=options.json)


@dataclass(frozen=True, slots=True)
class Case:
    """What is run."""

    schedule: str
    width: int
    tokens: int
    microbatches: int

    @property
    def name(self) -> str:
        return f"{self.schedule}/{self.width}x{self.tokens}"

    def plan(self) -> plans.Plan:
        return plans.build(self.schedule, RANKS, self.microbatches)

    def model(self) -> nn.Module:
        """The same weights on every call."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=self.width, intermediate_size=2 * self.width, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=self.tokens, use_cache=False,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = LlamaForCausalLM(config)
        return model

    def tokens_of_batch(self) -> Tensor:
        """The same on every call."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(VOCABULARY, (self.microbatches * SAMPLES, self.tokens), generator=generator)


def cases(schedules: str, shapes: str, microbatches: int) -> list[Case]:
    """Every schedule with every shape, from texts such as ``1f1b,zb-h1`` and ``64x32,128x64``.

    Raises:
        InputError: torch has no schedule to stand beside, or no shape.
    """
    if microbatches < RANKS:
        raise InputError("too few micro-batches", got=microbatches, needed=f"at least {RANKS}, one per rank")
    found = []
    for schedule in schedules.split(","):
        if schedule not in SCHEDULES:
            raise InputError("not a schedule that is measured here", got=repr(schedule),
                             needed=f"one of {', '.join(SCHEDULES)}")  # fmt: skip
        for shape in shapes.split(","):
            width, _, tokens = shape.partition("x")
            if not (width.isdecimal() and tokens.isdecimal() and int(width) and int(tokens)) or int(width) % 8:
                raise InputError("not a shape", got=repr(shape),
                                 needed="WIDTHxTOKENS, such as 64x32, with a width that 8 divides")  # fmt: skip
            found.append(Case(schedule, int(width), int(tokens), microbatches))
    return found


def measure(cases: Sequence[Case], rounds: Rounds) -> list[Row]:
    """Two rows per case."""
    jobs = [asdict(case) for case in cases]
    ranks = launch(_rank, RANKS, args=(jobs, rounds.samples, rounds.warmups))
    return [row for index, case in enumerate(cases) for row in _rows(case, [rank[index] for rank in ranks])]


def _rows(case: Case, ranks: Sequence[Mapping[str, Any]]) -> list[Row]:
    slowest = {
        name: quantiles([max(times) for times in zip(*(rank["samples"][name] for rank in ranks), strict=True)])
        for name in (PROVIDER, PEER)
    }
    return [
        Row(
            case.name, name, {"shape": [SAMPLES, case.tokens, case.width]}, time, slowest[PEER].p50 / time.p50,
            all(rank["correct"][name] for rank in ranks), {"made_ms": max(rank["made_ms"][name] for rank in ranks)},
        )
        for name, time in slowest.items()
    ]  # fmt: skip


def _rank(jobs: Sequence[Mapping[str, Any]], samples: int, warmups: int) -> list[dict[str, Any]]:
    """On each rank, for each case: its samples in µs, whether its results were right and what its stages took to make,
    by provider."""
    world = current_world()
    with torch_group.joined(world):
        return [_measure_case(world, Case(**job), Rounds(samples, warmups)) for job in jobs]


def _measure_case(world: World, case: Case, rounds: Rounds) -> dict[str, Any]:
    tokens = case.tokens_of_batch()
    loss, gradients = _unsplit(case, tokens)
    steps: dict[str, PipexStep | TracedStep] = {}
    made_ms, timed = {}, {}
    makers: dict[str, Callable[[], PipexStep | TracedStep]] = {
        PROVIDER: lambda: _pipex(case, tokens),
        PEER: lambda: TracedStep(case, world.rank, tokens),
    }
    for name, make in makers.items():
        begin = perf_counter()
        steps[name] = make()
        made_ms[name] = 1e3 * (perf_counter() - begin)
        timed[name] = TimedStep(world, steps[name].run, [gradients[n] for n in steps[name].names], TOLERANCE)
    times = rounds.interleave({name: step.sample for name, step in timed.items()})
    correct = {
        name: timed[name].correct and (step.loss is None or abs(step.loss - loss) <= TOLERANCE * loss)
        for name, step in steps.items()
    }
    for step in steps.values():
        step.close()
    return {"samples": times, "correct": correct, "made_ms": made_ms}


def _unsplit(case: Case, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the model in one process, micro-batch by micro-batch."""
    model = case.model()
    total = 0.0
    for piece in tokens.chunk(case.microbatches):
        loss = model(input_ids=piece, labels=piece).loss / case.microbatches
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _pipex(case: Case, tokens: Tensor) -> PipexStep:
    sample = {"input_ids": tokens[:SAMPLES], "labels": tokens[:SAMPLES]}
    # Units are the embedding, the layers, and norm and head.
    stages = split_model(case.model(), case.plan(), [LAYERS // 2 + 1] * RANKS, sample=sample)
    return PipexStep(stages, case.plan(), {"input_ids": tokens, "labels": tokens}, loss_fn="model")


class TracedStep:
    """The model as torch traces and cuts it.

    Attributes:
        names: of this rank's parameters in the model.
        loss: of the last step, on the last stage's rank; None elsewhere.
    """

    def __init__(self, case: Case, rank: int, tokens: Tensor) -> None:
        where = {f"model.layers.{LAYERS // 2}": SplitPoint.BEGINNING}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of a function of its own that it calls
            pipe = pipeline(case.model(), mb_args=(), mb_kwargs={"input_ids": tokens[:SAMPLES]}, split_spec=where)
        stage = pipe.build_stage(rank, tokens.device)
        named = dict(stage.submod.named_parameters())
        self.names, self._parameters = list(named), list(named.values())
        self.loss: float | None = None
        self._schedule = torch_schedule(case.schedule, [stage], case.microbatches, _next_token_loss)
        self._batch = {"input_ids": tokens} if rank == 0 else {}
        self._target = tokens if rank == RANKS - 1 else None

    def close(self) -> None:
        """Nothing is left to be done."""

    def run(self) -> list[Tensor]:
        for parameter in self._parameters:
            parameter.grad = None
        losses: list[Tensor] = []
        self._schedule.step(**self._batch, target=self._target, losses=losses, return_outputs=False)
        if losses:
            self.loss = torch.stack(losses).mean().item()  # pipex's step returns it too
        return [p.grad for p in self._parameters if p.grad is not None]


def _next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
