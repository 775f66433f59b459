"""Saving and loading a model in stages and its optimizer, all ranks together.

``names`` are a rank's tensors by the names that they have in the unsplit model (``names_of`` its stages); ``main`` are
its main weights by the same names, which are what its optimizer knows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipex import state
from pipex.errors import CheckpointError, PipexError
from pipex.partition import Stage
from pipex.runtime.agreement import share
from pipex.transport.interface import World

MAIN = "main/"


def names_of(stages: Iterable[Stage]) -> dict[str, Tensor]:
    """The tensors of stages by name; of a tied parameter the replica in the first, which is the optimizer's."""
    names: dict[str, Tensor] = {}
    for stage in stages:
        names = stage.names | names
    return names


def save(
    world: World, names: Mapping[str, Tensor], optimizer: Optimizer | None, step: int,
    directory: str | os.PathLike[str], meta: Mapping[str, Any], main: Mapping[str, Tensor],
) -> str | None:  # fmt: skip
    """Every rank writes its shard; when all have, rank 0 makes them the current checkpoint.

    Returns:
        None if it is saved; otherwise what went wrong, the same on every rank, and nothing of this attempt is left.
    """
    path, rank = Path(directory), world.rank
    shard = None
    error = ""
    try:
        tensors = state.model_state(names) | {MAIN + name: weight.detach() for name, weight in main.items()}
        values: dict[str, Any] = {}
        if optimizer is not None:
            optimizer_tensors, values = state.optimizer_state(optimizer, {**names, **main})
            tensors |= optimizer_tensors
        shard = state.write_shard(path, step, rank, tensors, values)
    except CheckpointError as failure:
        error = f"rank {rank}: {failure}"
    said = share(world, "save", [shard, error])
    shards = [theirs for theirs, _ in said if theirs is not None]
    errors = [text for _, text in said if text]
    if rank == 0 and not errors:
        try:
            state.commit(path, step, shards, {"pipex": dict(meta)})
        except CheckpointError as failure:
            errors = [f"rank 0: {failure}"]
    errors = share(world, "save", errors)[0]
    if not errors:
        return None
    if rank == 0:
        with suppress(CheckpointError):  # of a directory that cannot be read; it has been said why
            state.discard(path, shards)
    return f"no checkpoint was saved in {path}; the one before it stays: {'; '.join(errors)}"


def load(
    names: Mapping[str, Tensor], whole: Mapping[str, Tensor], optimizer: Optimizer | None,
    directory: str | os.PathLike[str], main: Mapping[str, Tensor],
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Restores this rank's part.

    Args:
        whole: the tensors of the whole model by name; only their shapes and dtypes are read.

    Returns:
        the optimizer steps that were done, and the ``meta`` that was saved.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another model.
    """
    checkpoint = state.Checkpoint.open(Path(directory))
    state.check_model(checkpoint, whole)
    state.load_model_state(checkpoint, names)
    if optimizer is not None:
        state.load_optimizer_state(checkpoint, optimizer, {**names, **main})
    saved = checkpoint.load(MAIN + name for name in main if MAIN + name in checkpoint.tensors)
    with torch.no_grad():
        for name, weight in main.items():  # of a run without main weights: what was rounded is all there is
            weight.copy_(saved.get(MAIN + name, names[name]))
    meta = checkpoint.meta["pipex"]
    if not isinstance(meta, dict):
        raise PipexError(f"{directory} was not saved by a pipeline")
    return checkpoint.step, meta
