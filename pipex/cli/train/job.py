"""What every rank of ``pipex train`` does."""

from __future__ import annotations

import ctypes
import hashlib
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import pipex.plan as plans
from pipex import state
from pipex.cli import hugging_face
from pipex.cli.plans.files import read_plan
from pipex.cli.train.options import Options
from pipex.cli.train.task import Task
from pipex.errors import CheckpointError
from pipex.observe import Event, Recorder
from pipex.partition import Stage
from pipex.plan import Plan
from pipex.runtime.agreement import share
from pipex.runtime.pairs import Pairs
from pipex.runtime.pipeline import Pipeline
from pipex.runtime.worlds import current_world

OBSERVED_STEPS = 50


@dataclass(frozen=True)
class Outcome:
    """What a run left behind, the same on every rank.

    Attributes:
        losses: of the steps of this run.
        seconds: per step of this run.
        events: per rank, of the last ``OBSERVED_STEPS`` steps.
        peaks: per rank the most micro-batches held at once.
        pairs: per rank, what became of the last step's.
        digests: SHA-256 of every parameter by name.
        interrupted: Ctrl-C ended the run before its last step.
    """

    losses: list[float]
    seconds: list[float]
    events: list[list[Event]]
    peaks: list[int]
    pairs: list[Pairs]
    digests: dict[str, str]
    interrupted: bool


def build_plan(options: Options, ranks: int) -> Plan:
    """The plan of a run."""
    if options.plan is not None:
        return read_plan(options.plan)
    chunks = {} if options.chunks is None else {"chunks": options.chunks}
    return plans.build(options.schedule, ranks, options.microbatches, **chunks)


def build_optimizer(options: Options) -> Any:
    """The optimizer's factory."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.01)


def clip_norm(options: Options, plan: Plan) -> float | None:
    """What gradients are clipped to."""
    return 1.0 if options.clip is None and not plan.asynchronous else options.clip


def describe_run(options: Options) -> dict[str, Any]:
    """What a resumed run must share with the saved one for its numbers to go on."""
    return {"seed": options.seed, "batch": options.batch, "context": options.context,
            "microbatches": options.microbatches}  # fmt: skip


def check_resume(options: Options, stages: list[Stage]) -> None:
    """Raises CheckpointError unless the checkpoint to go on from is one of this model and these options."""
    if options.resume is None:
        return
    checkpoint = state.Checkpoint.open(Path(options.resume))
    state.check_model(checkpoint, {n: f for stage in stages for n, f in state.forms_of(stage.names).items()})
    saved = checkpoint.meta.get("pipex")
    if saved != describe_run(options):
        raise CheckpointError("the checkpoint is of a run with other options", got=describe_run(options), needed=saved,
                              fix="give the options of the saved run")  # fmt: skip


def train(task: Task) -> Outcome:
    """Trains this rank's stage; collective."""
    world, options = current_world(), task.options
    recorder = Recorder(OBSERVED_STEPS)
    pipeline = Pipeline(
        task.stages(), task.plan, task.loss_fn, optimizer=build_optimizer(options),
        clip_norm=clip_norm(options, task.plan), seed=options.seed, observer=recorder, exact=options.check or None,
    )  # fmt: skip
    if options.resume is not None:
        pipeline.load(options.resume)
    stop = _Stop()
    losses: list[float] = []
    seconds: list[float] = []
    with _Progress(options, world.rank == 0, pipeline.steps) as progress:
        while pipeline.steps < options.steps and not stop.agreed():
            begin = time.perf_counter()
            losses.append(pipeline.step(*task.batch(pipeline.steps)))
            seconds.append(time.perf_counter() - begin)
            progress.show(pipeline.steps, losses[-1], seconds[-1])
    if options.save is not None:
        pipeline.save(options.save, describe_run(options))
    if options.save_pretrained is not None and options.hf is not None:
        pipeline.save_pretrained(options.save_pretrained)
        if world.rank == 0:
            hugging_face.copy_tokenizer(options.hf, options.save_pretrained)
    said = {
        "events": recorder.events,
        "peak": pipeline.peak_activations,
        "pairs": pipeline.pairs,
        "digests": _digests(pipeline.local_stages),
    }
    every = share(world, "the report", said)
    pipeline.close()
    return Outcome(
        losses, seconds,
        events=[[Event(*event) for event in rank["events"]] for rank in every],
        peaks=[rank["peak"] for rank in every],
        pairs=[Pairs(*rank["pairs"]) for rank in every],
        digests={name: digest for rank in every for name, digest in rank["digests"].items()},
        interrupted=pipeline.steps < options.steps,
    )  # fmt: skip


def _digests(stages: list[Stage]) -> dict[str, str]:
    return {name: digest(tensor) for stage in stages for name, tensor in stage.names.items()}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, with one NaN for all: which of two NaNs a sum keeps is up to the processor."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return hashlib.sha256(ctypes.string_at(tensor.data_ptr(), tensor.nbytes)).hexdigest()


class _Stop:
    """Ctrl-C: the run stops after the step in which any rank has seen it."""

    def __init__(self) -> None:
        self._wanted = False
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self._wanted = True

    def agreed(self) -> bool:
        """Collective."""
        return b"stop" in current_world().exchange(b"stop" if self._wanted else b"")


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; on rank 0 only."""

    def __init__(self, options: Options, shown: bool, done: int) -> None:
        self._options = options
        self._every = max(1, options.steps // 10)
        terminal = sys.stderr.isatty()
        self._lines = shown and not terminal and not options.json
        self._bar = tqdm(total=options.steps, initial=done, unit="step", disable=not (shown and terminal))

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, step: int, loss: float, seconds: float) -> None:
        speed = self._options.batch * self._options.context / seconds
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update()
        if self._lines and (step % self._every == 0 or step == 1):
            print(f"step {step:5d}  loss {loss:.3f}  {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
