"""``pipex train --check``: the same run in one process, compared bit for bit."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pipex import state
from pipex.cli.train.data import ByteText
from pipex.cli.train.job import Outcome, build_optimizer, build_plan, build_stages, digest
from pipex.cli.train.model import next_token_loss
from pipex.cli.train.options import Options
from pipex.runtime.reference import OneProcess


def differences(options: Options, text: ByteText, outcome: Outcome) -> list[str]:
    """What differs from one process, by name: ``loss of step 7``, ``blocks.3.up.weight``; nothing if all bits agree."""
    plan = build_plan(options, len(outcome.peaks))
    process = OneProcess(
        build_stages(options, plan.placement.stages), plan.microbatches, next_token_loss,
        optimizer=build_optimizer(options), clip_norm=options.clip, seed=options.seed,
    )  # fmt: skip
    names: dict[str, Tensor] = {}
    for stage in reversed(process.stages):
        names |= stage.names
    if options.resume is not None:
        checkpoint = state.Checkpoint.open(Path(options.resume))
        state.load_model_state(checkpoint, names)
        assert process.optimizer is not None
        state.load_optimizer_state(checkpoint, process.optimizer, names)
        process.steps = checkpoint.step
    different = []
    for expected in outcome.losses:
        found = process.step(*text.batch(process.steps, options.batch, options.context, options.seed))
        if found != expected:
            different.append(f"loss of step {process.steps}")
    different += [name for name, tensor in names.items() if digest(tensor) != outcome.digests.get(name)]
    return different
