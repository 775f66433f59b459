"""A model's parameters and buffers in a checkpoint, as ``model/<name in the unsplit model>``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipex.errors import CheckpointError
from pipex.state.checkpoint import Checkpoint, Restore
from pipex.state.files import listed
from pipex.state.serialize import form

PREFIX = "model/"


def model_state(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``Stage.names`` (of one stage or of several together), under their names in a checkpoint."""
    return {PREFIX + name: tensor.detach() for name, tensor in names.items()}


def forms_of(names: Mapping[str, Tensor]) -> dict[str, str]:
    """The forms of tensors, which are theirs in a checkpoint too."""
    return {name: form(tensor) for name, tensor in names.items()}


def check_model(checkpoint: Checkpoint, forms: Mapping[str, str]) -> None:
    """Checks that a checkpoint is one of this model. ``forms``: of all stages together.

    Raises:
        CheckpointError: lists missing and unexpected names, and differences of shape or dtype.
    """
    saved = {name.removeprefix(PREFIX) for name in checkpoint.tensors if name.startswith(PREFIX)}
    _compare(checkpoint, forms, unexpected=sorted(saved - forms.keys()))


def read_model_state(checkpoint: Checkpoint, names: Mapping[str, Tensor]) -> Restore:
    """Reads the saved values of the given tensors, the part of the model that this rank holds; what it returns copies
    them there.

    Raises:
        CheckpointError: a name is missing, a shape or dtype differs, or a file is damaged.
    """
    _compare(checkpoint, forms_of(names), unexpected=[])
    values = checkpoint.load(PREFIX + name for name in names)

    def restore() -> None:
        with torch.no_grad():
            for name, tensor in names.items():
                tensor.copy_(values[PREFIX + name])

    return restore


def _compare(checkpoint: Checkpoint, forms: Mapping[str, str], unexpected: list[str]) -> None:
    saved = checkpoint.tensors
    missing = [name for name in forms if PREFIX + name not in saved]
    different = [
        f"{name} is {saved[PREFIX + name]}, needed {needed}"
        for name, needed in forms.items()
        if saved.get(PREFIX + name, needed) != needed
    ]
    if missing or unexpected or different:
        raise CheckpointError(
            f"the checkpoint in {checkpoint.directory} is of another model",
            got=listed(missing=missing, unexpected=unexpected, different=different),
            fix="build the model that was saved, or start without the checkpoint",
        )
