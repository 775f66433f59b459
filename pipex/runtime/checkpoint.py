"""Saving and loading a model in stages and its optimizer, all ranks together.

``main`` are a rank's main weights, which are what its optimizer knows, by the names that their parameters have in the
unsplit model (``names_of`` its stages).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipex import state
from pipex.errors import CheckpointError, UnsupportedModule
from pipex.partition import Stage
from pipex.runtime.agreement import share
from pipex.runtime.copying import checksum
from pipex.runtime.versions import Versions, Weights
from pipex.state.optimizer import MAIN
from pipex.transport.interface import World

PREVIOUS = "previous/"
"""of the weights before the newest, under the names of the model's"""


def names_of(stages: Iterable[Stage]) -> dict[str, Tensor]:
    """The tensors of stages by name; of a tied parameter the replica in the first, which is the optimizer's.

    Raises:
        CheckpointError: they cannot be named, after what was changed in them.
    """
    names: dict[str, Tensor] = {}
    try:
        for stage in stages:
            names = stage.names | names
    except UnsupportedModule as problem:
        raise CheckpointError(str(problem)) from problem
    return names


def save(
    world: World, stages: Sequence[Stage], optimizer: Optimizer | None, objects: Mapping[str, state.Stateful],
    step: int, directory: str | os.PathLike[str], meta: Mapping[str, Any], main: Mapping[str, Tensor],
    versions: Versions | None, owners: Mapping[str, int],
) -> str | None:  # fmt: skip
    """Every rank writes its shard; when all have, rank 0 makes them the current checkpoint.

    Args:
        versions: of the weights, where a plan changes them within a step: the next one begins with older ones too.
        owners: by name, the rank that saves what several hold alike.

    Returns:
        None if it is saved; otherwise what went wrong, the same on every rank, and nothing of this attempt is left.
    """
    path, rank = Path(directory), world.rank
    shard = None
    error = ""
    names: dict[str, Tensor] = {}
    try:
        if not isinstance(meta, Mapping):
            raise CheckpointError("meta cannot be saved", got=type(meta).__name__, needed="a dict")
        names = names_of(stages)
        others = {name for name in names if owners.get(name, rank) != rank}
        tensors = state.model_state({name: tensor for name, tensor in names.items() if name not in others})
        tensors |= {MAIN + name: weight.detach() for name, weight in main.items() if name not in others}
        older = {} if versions is None else {id(p): weight for p, weight in versions.previous.items()}
        tensors |= {PREVIOUS + name: older[id(p)] for name, p in names.items() if id(p) in older}
        values: dict[str, Any] = {}
        if optimizer is not None:
            optimizer_tensors, values = state.optimizer_state(optimizer, {**names, **main}, others)
            tensors |= optimizer_tensors
        object_tensors, object_values = state.object_state(objects, rank)
        tensors |= object_tensors
        values |= object_values
        shard = state.write_shard(path, step, rank, tensors, values)
    except CheckpointError as failure:
        error = f"rank {rank}: {failure}"
    sums = {name: checksum(tensor) for name, tensor in names.items() if name in owners}
    said = share(world, "save", [shard, error, step, sums])
    shards = [theirs for theirs, *_ in said if theirs is not None]
    errors = [text for _, text, *_ in said if text]
    steps = [theirs for _, _, theirs, _ in said]
    errors += different([theirs for *_, theirs in said])
    if len(set(steps)) > 1:
        errors.append(f"the ranks have made different numbers of updates: {', '.join(map(str, steps))}")
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
    world: World, stages: Sequence[Stage], optimizer: Optimizer | None, objects: Mapping[str, state.Stateful],
    directory: str | os.PathLike[str], main: Mapping[str, Tensor], versions: Versions | None,
) -> tuple[int, dict[str, Any]] | str:  # fmt: skip
    """Every rank reads its part; when all have, each puts it in place.

    Args:
        stages: those of this rank.
        versions: as of ``save``.

    Returns:
        the optimizer steps that were done, and the ``meta`` that was saved; or what is wrong (there is no checkpoint,
        it is damaged, or of another model), the same on every rank, and nothing has changed.
    """
    names: dict[str, Tensor] = {}
    identity = error = ""
    meta: Any = None
    restores: list[state.Restore] = []
    try:
        names = names_of(stages)
    except CheckpointError as failure:
        error = str(failure)
    said = share(world, "load", [state.forms_of(names), error])
    if problem := together([text for _, text in said]):
        return problem
    model = {name: form for forms, _ in said for name, form in forms.items()}
    try:
        checkpoint = state.Checkpoint.open(Path(directory))
        identity = f"step {checkpoint.step} ({checkpoint.identity})"
        meta = checkpoint.meta.get("pipex")
        if not isinstance(meta, dict):
            raise CheckpointError(f"{directory} was not saved by a pipeline")
        state.check_model(checkpoint, model)
        restores.append(state.read_model_state(checkpoint, names))
        if optimizer is not None:
            restores.append(state.read_optimizer_state(checkpoint, optimizer, {**names, **main}))
        saved = checkpoint.load(MAIN + name for name in main if MAIN + name in checkpoint.tensors)
        # Of a run without main weights: what was rounded is all there is.
        if versions is not None:
            restores.append(read_previous(checkpoint, names, versions.resume))
        restores.append(lambda: _put({weight: saved.get(MAIN + n, names[n]) for n, weight in main.items()}))
        restores.append(state.read_object_state(checkpoint, objects, world.rank, world.ranks))
    except CheckpointError as failure:
        error = str(failure)
    said = share(world, "load", [identity, error])
    if problem := together([text for _, text in said]):
        return problem
    if other := next((rank for rank, (theirs, _) in enumerate(said) if theirs != said[0][0]), None):
        return (
            f"the ranks find different checkpoints in {directory}; "
            f"got {said[0][0]} on rank 0, {said[other][0]} on rank {other}; "
            "load from a directory that all hosts share, and into which nothing is saved meanwhile"
        )
    for restore in restores:
        restore()
    return checkpoint.step, meta


def read_previous(
    checkpoint: state.Checkpoint, names: Mapping[str, Tensor], resume: Callable[[Weights], None]
) -> state.Restore:
    """Reads the weights before the newest; what it returns hands them to ``resume``: none, if none were saved.

    Raises:
        CheckpointError: they do not fit the parameters.
    """
    forms = {name: form for name, form in state.forms_of(names).items() if PREVIOUS + name in checkpoint.tensors}
    for name, form in forms.items():
        if (saved := checkpoint.tensors[PREVIOUS + name]) != form:
            raise CheckpointError(f"the older weights of {name} are of another model", got=saved, needed=form)
    saved_values = checkpoint.load(PREVIOUS + name for name in forms)
    older = {names[name]: saved_values[PREVIOUS + name] for name in forms}
    return lambda: resume({p: value.to(p.device) for p, value in older.items() if isinstance(p, nn.Parameter)})


def different(sums: Sequence[Mapping[str, int]]) -> list[str]:
    """What is wrong with the checksums, by rank, of what several ranks hold: the first copy that is another one."""
    known: dict[str, tuple[int, int]] = {}
    for rank, theirs in enumerate(sums):
        for name, found in theirs.items():
            first, expected = known.setdefault(name, (rank, found))
            if found != expected:
                return [f"the copies of {name} on the ranks {first} and {rank} are not the same any more; make every "
                        "change to parameters and optimizers on all ranks alike"]  # fmt: skip
    return []


def together(errors: Sequence[str]) -> str:
    """The ranks' errors, in rank order, in one; empty if none of them has one."""
    if len(set(errors)) == 1:
        return errors[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text)


def _put(values: Mapping[Tensor, Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in values.items():
            tensor.copy_(value)
