"""``pipex train --check``: the same run in one process, compared bit for bit."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pipex import state
from pipex.cli.train.job import Outcome, build_optimizer, clip_norm, digest
from pipex.cli.train.task import Task
from pipex.runtime.checkpoint import read_previous
from pipex.runtime.reference import OneProcess
from pipex.runtime.reference_versions import OneProcessWithVersions
from pipex.runtime.worlds import current_world


def prepare(task: Task) -> OneProcess:
    """The one process, in the state in which the run begins; call it before the run, which may save over --resume."""
    options, plan = task.options, task.plan
    stages = [stage.to(current_world().device) for stage in task.stages()]
    optimizer = build_optimizer(options)
    if plan.asynchronous:
        process: OneProcess = OneProcessWithVersions(stages, plan, task.loss_fn, optimizer=optimizer, seed=options.seed)
    else:
        process = OneProcess(
            stages, plan, task.loss_fn, optimizer=optimizer, clip_norm=clip_norm(options, plan), seed=options.seed
        )
    if options.resume is not None:
        checkpoint = state.Checkpoint.open(Path(options.resume))
        assert process.optimizer is not None
        state.read_model_state(checkpoint, _names(process))()
        state.read_optimizer_state(checkpoint, process.optimizer, _names(process))()
        process.steps = checkpoint.step
        if isinstance(process, OneProcessWithVersions):
            read_previous(checkpoint, _names(process), process.resume)()
    return process


def differences(process: OneProcess, task: Task, outcome: Outcome) -> list[str]:
    """What differs from one process, by name: ``loss of step 7``, ``blocks.3.up.weight``; nothing if all bits agree."""
    different = []
    for expected in outcome.losses:
        found = process.step(*task.batch(process.steps))
        if found.hex() != expected.hex():  # the bits: NaN is not equal to itself
            different.append(f"loss of step {process.steps}")
    names = _names(process)
    return different + [name for name, tensor in names.items() if digest(tensor) != outcome.digests.get(name)]


def _names(process: OneProcess) -> dict[str, Tensor]:
    """All tensors by name. Of a tied parameter the replica that the optimizer knows."""
    names: dict[str, Tensor] = {}
    for stage in reversed(process.stages):
        names |= stage.names
    return names
