"""Saving and loading a pipeline, all ranks together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipex import state
from pipex.errors import CheckpointError, PipexError
from pipex.runtime.agreement import share

if TYPE_CHECKING:
    from pipex.runtime.pipeline import Pipeline


def save(pipeline: Pipeline, directory: str | os.PathLike[str], meta: Mapping[str, Any]) -> str | None:
    """Every rank writes its shard; when all have, rank 0 makes them the current checkpoint.

    Returns:
        None if it is saved; otherwise what went wrong, the same on every rank, and nothing of this attempt is left.
    """
    path, rank, step = Path(directory), pipeline.world.rank, pipeline.steps
    names = _names(pipeline)
    shard = None
    error = ""
    try:
        tensors = state.model_state(names)
        values: dict[str, Any] = {}
        if pipeline.optimizer is not None:
            optimizer_tensors, values = state.optimizer_state(pipeline.optimizer, names)
            tensors |= optimizer_tensors
        shard = state.write_shard(path, step, rank, tensors, values)
    except CheckpointError as failure:
        error = f"rank {rank}: {failure}"
    said = share(pipeline.world, "save", [shard, error])
    shards = [theirs for theirs, _ in said if theirs is not None]
    errors = [text for _, text in said if text]
    if rank == 0 and not errors:
        try:
            state.commit(path, step, shards, {"pipex": dict(meta)})
        except CheckpointError as failure:
            errors = [f"rank 0: {failure}"]
    errors = share(pipeline.world, "save", errors)[0]
    if not errors:
        return None
    if rank == 0:
        with suppress(CheckpointError):  # of a directory that cannot be read; it has been said why
            state.discard(path, shards)
    return f"no checkpoint was saved in {path}; the one before it stays: {'; '.join(errors)}"


def load(pipeline: Pipeline, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Restores this rank's part.

    Raises:
        CheckpointError: as ``Pipeline.load``.
    """
    checkpoint = state.Checkpoint.open(Path(directory))
    names = _names(pipeline)
    every: dict[str, Tensor] = {}
    for stage in pipeline.stages:
        every |= stage.names
    state.check_model(checkpoint, every)
    state.load_model_state(checkpoint, names)
    if pipeline.optimizer is not None:
        state.load_optimizer_state(checkpoint, pipeline.optimizer, names)
    pipeline.steps = checkpoint.step
    meta = checkpoint.meta["pipex"]
    if not isinstance(meta, dict):
        raise PipexError(f"{directory} was not saved by a pipeline")
    return meta


def _names(pipeline: Pipeline) -> dict[str, Tensor]:
    """This rank's tensors by name. Of a tied parameter the replica that the optimizer knows."""
    names: dict[str, Tensor] = {}
    for stage in reversed(pipeline.local_stages):
        names |= stage.names
    return names
