"""A narrow model of the same layers, in place of one without values."""

from __future__ import annotations

import torch
from torch import nn

from pipex.errors import UnsupportedModule, headline
from pipex.hugging_face.conventions import is_pretrained
from pipex.hugging_face.shrunk import shrunk


def has_values(model: nn.Module) -> bool:
    """Whether none of its parameters is on the meta device."""
    return not any(parameter.is_meta for parameter in model.parameters())


def narrow(model: nn.Module) -> nn.Module:
    """A model of the same class, layers, modes, dtype and frozen parameters as a ``PreTrainedModel``, but of another
    width, with random values.

    Raises:
        UnsupportedModule: it is another model, or its configuration cannot be made narrow.
    """
    needed = "a PreTrainedModel, of which a narrow one can be made to learn the cut from"
    if not is_pretrained(model):
        raise UnsupportedModule(
            f"{type(model).__name__} has no values, and so cannot run on the sample",
            got="parameters on the meta device", needed=needed, fix="give it values before it is split",
        )  # fmt: skip
    config: object = model.config
    try:
        small = type(model)(shrunk(config))
    except Exception as error:
        raise UnsupportedModule(
            f"no narrow {type(model).__name__} can be made of its configuration", got=headline(error), needed=needed,
            fix="give the model values before it is split",
        ) from error  # fmt: skip
    small.to(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(name not in frozen)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(name, module.training)
    return small
