"""Building a model of which no process could hold all parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pipex.hugging_face import build, read_configuration


def empty_model(directory: str | os.PathLike[str], model_class: Any = None) -> nn.Module:
    """The model whose files are in a directory, in training mode, without values: its parameters are on the meta
    device.

    A pipeline gives a rank's own stages memory, and ``load_pretrained(directory)`` values, so no rank ever holds more.
    Nothing is downloaded, and no code of the directory runs.

    Args:
        directory: with ``config.json``, and the files that ``load_pretrained`` reads.
        model_class: a class of transformers, or one of its Auto classes; None: the one that was saved.

    Raises:
        InputError: there is no configuration there, or none that transformers knows a class for.
    """
    configuration = read_configuration(Path(directory))
    with without_values():
        return build(configuration, model_class)


@contextmanager
def without_values() -> Iterator[None]:
    """Lets modules that are built in here have their parameters on the meta device, each as soon as it is a module's.

    Buffers get memory and values: those that no file holds, such as the frequencies of rotary embeddings, are computed
    when a module is built. (``with torch.device("meta")`` leaves them without.)
    """
    moved: dict[int, tuple[ref[nn.Parameter], nn.Parameter]] = {}  # what several modules share stays one

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or nn.parameter.is_lazy(parameter):
            return None  # as it is
        known = moved.get(id(parameter))
        if known is None or known[0]() is not parameter:  # else an id that was another's before
            form = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            vars(form).update(vars(parameter))
            moved[id(parameter)] = known = ref(parameter), form
        return known[1]

    # What a hook may return, torch has not typed.
    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()
